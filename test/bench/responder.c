/*-------------------------------------------------------------------------
 *
 * responder.c
 *	  The other end of the measurements of calls to Stripe: one answer to all.
 *
 *	  responder [MS]
 *
 * Listens on a loopback port, which it prints, and answers every HTTP request
 * with the same payment intent, MS milliseconds after the request arrived
 * (none unless given).  Connections are kept.  It ends when standard input
 * does.  It looks for the end of a request and at nothing else, so that
 * neither side is measured with a server's work; test/stripe is the server to
 * test with.
 *
 * Copyright (c) 2026, idempotency developers
 *
 * test/bench/responder.c
 *
 *-------------------------------------------------------------------------
 */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <strings.h>
#include <sys/epoll.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

#define MAX_CONNECTIONS 1024	/* and file descriptors */
#define REQUEST_SIZE 16384

typedef struct Connection
{
	size_t		len;
	char		request[REQUEST_SIZE];
} Connection;

/* Answers that are due; all wait equally long, so this is a queue. */
typedef struct Due
{
	int			fd;
	int64_t		at;				/* nanoseconds */
} Due;

static Connection *connections[MAX_CONNECTIONS];
static Due	due[MAX_CONNECTIONS];
static unsigned due_first = 0;
static unsigned due_end = 0;

static const char body[] =
"{\"id\": \"pi_bench\", \"object\": \"payment_intent\", \"amount\": 2000, \"amount_capturable\": 0, "
"\"amount_details\": {\"tip\": {}}, \"amount_received\": 2000, \"application\": null, \"application_fee_amount\": null, "
"\"automatic_payment_methods\": null, \"canceled_at\": null, \"cancellation_reason\": null, \"capture_method\": \"automatic\", "
"\"client_secret\": \"pi_bench_secret_of_a_test\", \"confirmation_method\": \"automatic\", \"created\": 1767225600, "
"\"currency\": \"eur\", \"customer\": null, \"description\": null, \"last_payment_error\": null, \"latest_charge\": \"ch_bench\", "
"\"livemode\": false, \"metadata\": {}, \"next_action\": null, \"on_behalf_of\": null, \"payment_method\": \"pm_bench\", "
"\"payment_method_options\": {\"card\": {\"installments\": null, \"mandate_options\": null, \"network\": null, "
"\"request_three_d_secure\": \"automatic\"}}, \"payment_method_types\": [\"card\"], \"processing\": null, \"receipt_email\": null, "
"\"review\": null, \"setup_future_usage\": null, \"shipping\": null, \"source\": null, \"statement_descriptor\": null, "
"\"status\": \"succeeded\", \"transfer_data\": null, \"transfer_group\": null}";

static char answer[sizeof(body) + 512];
static size_t answer_len;

static void
fail(const char *what)
{
	perror(what);
	exit(1);
}

static int64_t
now(void)
{
	struct timespec t;

	clock_gettime(CLOCK_MONOTONIC, &t);
	return (int64_t) t.tv_sec * 1000000000 + t.tv_nsec;
}

static void
drop(int fd)
{
	free(connections[fd]);
	connections[fd] = NULL;
	close(fd);
}

/* Send the answer: it fits into the socket's buffer, or the client is gone. */
static void
send_answer(int fd)
{
	if (connections[fd] != NULL && send(fd, answer, answer_len, MSG_NOSIGNAL) != (ssize_t) answer_len)
		drop(fd);
}

/*
 * Has a whole request arrived?  The client sends no second one before it is
 * answered.
 */
static bool
is_complete(Connection *connection)
{
	char	   *end;
	char	   *length;

	connection->request[connection->len] = '\0';
	end = strstr(connection->request, "\r\n\r\n");
	if (end == NULL)
		return false;
	length = strcasestr(connection->request, "\r\nContent-Length:");
	return connection->len >= (size_t) (end + 4 - connection->request) +
		(length != NULL && length < end ? strtoul(length + strlen("\r\nContent-Length:"), NULL, 10) : 0);
}

/* Read what there is.  Returns true if that completes a request. */
static bool
take_request(int fd)
{
	Connection *connection = connections[fd];
	ssize_t		got = recv(fd, connection->request + connection->len,
						   REQUEST_SIZE - 1 - connection->len, 0);

	if (got <= 0)
	{
		if (got == 0 || (errno != EAGAIN && errno != EINTR))
			drop(fd);
		return false;
	}
	connection->len += got;
	if (!is_complete(connection))
		return false;
	connection->len = 0;
	return true;
}

static void
add(int epoll, int fd)
{
	struct epoll_event event = {.events = EPOLLIN};

	event.data.fd = fd;
	if (epoll_ctl(epoll, EPOLL_CTL_ADD, fd, &event) != 0)
		fail("epoll_ctl");
}

static void
accept_one(int epoll, int listener)
{
	int			fd = accept4(listener, NULL, NULL, SOCK_NONBLOCK);
	int			on = 1;

	if (fd < 0)
		return;
	if (fd >= MAX_CONNECTIONS || (connections[fd] = calloc(1, sizeof(Connection))) == NULL)
	{
		close(fd);
		return;
	}
	setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &on, sizeof(on));
	add(epoll, fd);
}

int
main(int argc, char **argv)
{
	int64_t		delay = argc > 1 ? atoll(argv[1]) * 1000000 : 0;
	struct sockaddr_in address = {.sin_family = AF_INET};
	socklen_t	address_len = sizeof(address);
	int			listener = socket(AF_INET, SOCK_STREAM | SOCK_NONBLOCK, 0);
	int			epoll = epoll_create1(0);

	address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
	answer_len = snprintf(answer, sizeof(answer),
						  "HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: %zu\r\n"
						  "Request-Id: req_bench\r\nStripe-Should-Retry: false\r\nConnection: keep-alive\r\n\r\n%s",
						  sizeof(body) - 1, body);

	if (listener < 0 || epoll < 0 ||
		bind(listener, (struct sockaddr *) &address, sizeof(address)) != 0 ||
		listen(listener, 512) != 0 ||
		getsockname(listener, (struct sockaddr *) &address, &address_len) != 0)
		fail("responder");
	add(epoll, listener);
	add(epoll, STDIN_FILENO);
	printf("%d\n", ntohs(address.sin_port));
	fflush(stdout);

	for (;;)
	{
		struct epoll_event events[64];
		int			timeout = -1;
		int			n;

		while (due_first != due_end && due[due_first % MAX_CONNECTIONS].at <= now())
			send_answer(due[due_first++ % MAX_CONNECTIONS].fd);
		if (due_first != due_end)
			timeout = (due[due_first % MAX_CONNECTIONS].at - now()) / 1000000 + 1;

		n = epoll_wait(epoll, events, 64, timeout);
		for (int i = 0; i < n; i++)
		{
			int			fd = events[i].data.fd;

			if (fd == STDIN_FILENO)
				return 0;
			else if (fd == listener)
				accept_one(epoll, listener);
			else if (connections[fd] != NULL && take_request(fd))
			{
				if (delay == 0)
					send_answer(fd);
				else
				{
					Due		   *new_due = &due[due_end++ % MAX_CONNECTIONS];

					new_due->fd = fd;
					new_due->at = now() + delay;
				}
			}
		}
	}
}
