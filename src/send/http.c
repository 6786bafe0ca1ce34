/*-------------------------------------------------------------------------
 *
 * http.c
 *	  HTTP requests from inside a backend, by libcurl.
 *
 * The only file that knows libcurl, and the only one of idempotency_stripe.so.
 *
 * Waiting.  libcurl says which sockets it waits for and how long, and we wait
 * for them in a WaitEventSet along with the latch and the postmaster's death.
 * So a cancel, statement_timeout, a terminate and a ProcSignalBarrier are
 * served at once, in the middle of a request.
 *
 * Errors.  No longjmp passes through a frame of libcurl's: what it calls back
 * raises nothing and allocates with MCXT_ALLOC_NO_OOM only, and interrupts are
 * served between two calls of it.  An error on our side leaves through
 * PG_FINALLY, which takes the transfer out of libcurl; a connection with half
 * an exchange on it is closed by that.
 *
 * Signals.  libcurl resolves names in a thread.  It inherits the signal mask
 * of the moment, so all signals are blocked while libcurl runs: handlers of
 * PostgreSQL's run in the main thread only.
 *
 * Arrivals.  libcurl sends a request again, silently and up to five times, if
 * a connection kept from an earlier request ends before the first byte of an
 * answer (Curl_retry_request).  We prevent that: a request that may have left
 * gets no second connection (open_socket) and is not begun on one
 * (before_request).  One perform() is one arrival at the server at most.  And
 * a kept connection on which anything waits to be read is not used again: it
 * is an end of file, or else an answer to a question that we did not ask.
 *
 * State.  One multi handle a backend, which keeps the connection of the last
 * request, and one easy handle, which keeps TLS sessions.  They are made by the
 * first request, and never in the postmaster.  curl_global_cleanup() is not
 * called, because other libraries in this process may use libcurl, too.
 *
 * Copyright (c) 2026, idempotency developers
 *
 * src/send/http.c
 *
 *-------------------------------------------------------------------------
 */
#include "postgres.h"

#include <arpa/inet.h>
#include <fcntl.h>
#include <netinet/in.h>
#include <poll.h>
#include <signal.h>
#include <sys/socket.h>
#include <unistd.h>

#include <curl/curl.h>

#include "fmgr.h"
#include "miscadmin.h"
#include "portability/instr_time.h"
#include "storage/fd.h"
#include "storage/latch.h"
#include "utils/memutils.h"
#include "utils/wait_event.h"

#include "base/compat.h"
#include "send/http.h"

#if LIBCURL_VERSION_NUM < 0x075000
#error "idempotency needs libcurl 7.80 or later"
#endif

IDEMPOTENCY_MODULE_MAGIC;

PGDLLEXPORT const HttpClient *idempotency_http_client(void);

/*
 * File descriptors to account for.  All the time: libcurl's wakeup pair and
 * the connection that is kept.  During a request: a connection that replaces
 * it, one of the other address family, and the resolver's pair.
 */
#define KEPT_FDS 3
#define REQUEST_FDS 4

/* Sockets that libcurl waits for at one time. */
#define MAX_SOCKETS 8

/* A kept connection is not used after so many idle seconds. */
#define MAX_IDLE 45

/* The headers of an answer together, in bytes. */
#define MAX_HEADERS (64 * 1024)

/* What is allocated for a body at first, in bytes. */
#define FIRST_BODY_SIZE (16 * 1024)

/* The longest wait at a time, in milliseconds. */
#define MAX_WAIT 1000

/* A request under way. */
typedef struct Transfer
{
	const HttpRequest *request;
	HttpResponse *response;
	MemoryContext context;		/* of the body */
	size_t		body_size;		/* allocated */
	size_t		header_bytes;
	bool		plain;			/* http, so to loopback only */
	const char *refusal;		/* why we ended it, or NULL */
} Transfer;

static CURLM *multi = NULL;
static CURL *easy = NULL;
static bool kept_fds = false;
static curl_socket_t idle_socket = CURL_SOCKET_BAD;

/* What libcurl waits for; filled in by its callbacks. */
static struct
{
	curl_socket_t fd;
	int			what;			/* CURL_POLL_... */
}			sockets[MAX_SOCKETS];
static int	nsockets = 0;
static bool sockets_changed = false;
static bool sockets_overflow = false;
static bool timer_set = false;
static instr_time timer_start;
static long timer_ms = 0;

static uint32 wait_event = 0;

/* ---------- called by libcurl: nothing here raises an error ---------- */

/* CURLMOPT_SOCKETFUNCTION: wait for a socket, or no longer. */
static int
watch_socket(CURL *handle, curl_socket_t fd, int what, void *arg, void *socket_arg)
{
	int			i;

	for (i = 0; i < nsockets && sockets[i].fd != fd; i++)
		;

	if (what == CURL_POLL_REMOVE)
	{
		if (i < nsockets)
			sockets[i] = sockets[--nsockets];
	}
	else if (i < MAX_SOCKETS)
	{
		sockets[i].fd = fd;
		sockets[i].what = what;
		if (i == nsockets)
			nsockets++;
	}
	else
		sockets_overflow = true;

	sockets_changed = true;
	return 0;
}

/* CURLMOPT_TIMERFUNCTION: call libcurl after so many milliseconds. */
static int
set_timer(CURLM *handle, long ms, void *arg)
{
	timer_set = (ms >= 0);
	timer_ms = ms;
	INSTR_TIME_SET_CURRENT(timer_start);
	return 0;
}

static bool
is_loopback(const struct sockaddr *address)
{
	if (address->sa_family == AF_INET)
		return (ntohl(((const struct sockaddr_in *) address)->sin_addr.s_addr) >> 24) == 127;
	if (address->sa_family == AF_INET6)
		return IN6_IS_ADDR_LOOPBACK(&((const struct sockaddr_in6 *) address)->sin6_addr);
	return false;
}

/* CURLOPT_OPENSOCKETFUNCTION */
static curl_socket_t
open_socket(void *arg, curlsocktype purpose, struct curl_sockaddr *address)
{
	Transfer   *transfer = arg;
	int			type = address->socktype;

	/* this would be libcurl's silent second attempt */
	if (transfer->response->sent)
	{
		transfer->refusal = "connection was closed before the answer";
		return CURL_SOCKET_BAD;
	}

	/* the name was checked before, but others decide what it resolves to */
	if (transfer->plain && !is_loopback(&address->addr))
	{
		transfer->refusal = "http is for loopback addresses only";
		return CURL_SOCKET_BAD;
	}

#ifdef SOCK_CLOEXEC
	type |= SOCK_CLOEXEC;
#endif
	return socket(address->family, type, address->protocol);
}

/*
 * CURLOPT_PREREQFUNCTION: a connection is established, and the request is
 * written next.  From here on it may have left.
 */
static int
before_request(void *arg, char *remote_address, char *local_address,
			   int remote_port, int local_port)
{
	Transfer   *transfer = arg;

	if (transfer->response->sent)
	{
		transfer->refusal = "connection was closed before the answer";
		return CURL_PREREQFUNC_ABORT;
	}
	if (transfer->request->sending != NULL)
		transfer->request->sending();
	transfer->response->sent = true;
	return CURL_PREREQFUNC_OK;
}

/* The value of a header line, or NULL if it has another name. */
static const char *
header_value(const char *line, size_t len, const char *name, size_t *value_len)
{
	size_t		name_len = strlen(name);
	const char *value = line + name_len + 1;
	const char *end = line + len;

	if (len <= name_len || line[name_len] != ':' ||
		pg_strncasecmp(line, name, name_len) != 0)
		return NULL;

	while (value < end && (*value == ' ' || *value == '\t'))
		value++;
	while (end > value && (end[-1] == '\r' || end[-1] == '\n' || end[-1] == ' ' || end[-1] == '\t'))
		end--;
	*value_len = end - value;
	return value;
}

/* Is a value this word, in upper or lower case? */
static bool
equals(const char *value, size_t len, const char *word)
{
	return len == strlen(word) && pg_strncasecmp(value, word, len) == 0;
}

/* CURLOPT_HEADERFUNCTION */
static size_t
take_header(char *line, size_t size, size_t nmemb, void *arg)
{
	Transfer   *transfer = arg;
	HttpResponse *response = transfer->response;
	size_t		len = size * nmemb;
	const char *value;
	size_t		value_len;

	transfer->header_bytes += len;
	if (transfer->header_bytes > MAX_HEADERS)
	{
		transfer->refusal = "headers of the answer are too large";
		return 0;
	}

	/* a status line: forget what an interim answer (1xx) has said */
	if (len >= 5 && memcmp(line, "HTTP/", 5) == 0)
	{
		response->request_id[0] = '\0';
		response->should_retry = STRIPE_RETRY_UNSAID;
		response->replayed = false;
	}
	else if ((value = header_value(line, len, "Request-Id", &value_len)) != NULL)
	{
		size_t		i = 0;

		if (value_len < sizeof(response->request_id))
		{
			while (i < value_len && value[i] > 0x20 && value[i] < 0x7f)
				i++;
			if (i == value_len)
			{
				memcpy(response->request_id, value, value_len);
				response->request_id[value_len] = '\0';
			}
		}
	}
	else if ((value = header_value(line, len, "Stripe-Should-Retry", &value_len)) != NULL)
	{
		if (equals(value, value_len, "true"))
			response->should_retry = STRIPE_RETRY_TRUE;
		else if (equals(value, value_len, "false"))
			response->should_retry = STRIPE_RETRY_FALSE;
	}
	else if ((value = header_value(line, len, "Idempotent-Replayed", &value_len)) != NULL)
		response->replayed = equals(value, value_len, "true");

	return len;
}

/* CURLOPT_WRITEFUNCTION */
static size_t
take_body(char *data, size_t size, size_t nmemb, void *arg)
{
	Transfer   *transfer = arg;
	HttpResponse *response = transfer->response;
	size_t		len = size * nmemb;

	if (len > transfer->request->max_body - response->body_len)
	{
		response->too_large = true;
		transfer->refusal = "answer is too large";
		return 0;
	}

	if (response->body_len + len >= transfer->body_size)
	{
		size_t		new_size = Max(transfer->body_size * 2, response->body_len + len + 1);
		char	   *new_body;

		new_size = Min(new_size, transfer->request->max_body + 1);
		new_body = MemoryContextAllocExtended(transfer->context, new_size,
											  MCXT_ALLOC_HUGE | MCXT_ALLOC_NO_OOM);
		if (new_body == NULL)
		{
			transfer->refusal = "out of memory for the answer";
			return 0;
		}
		memcpy(new_body, response->body, response->body_len);
		pfree(response->body);
		response->body = new_body;
		transfer->body_size = new_size;
	}

	memcpy(response->body + response->body_len, data, len);
	response->body_len += len;
	return len;
}

/* ---------- calling libcurl ---------- */

static void
block_signals(sigset_t *before)
{
	sigset_t	all;

	sigfillset(&all);
	sigprocmask(SIG_BLOCK, &all, before);
}

static void
unblock_signals(sigset_t *before)
{
	sigprocmask(SIG_SETMASK, before, NULL);
}

/* Let libcurl act on a socket, or on its timer. */
static CURLMcode
act(curl_socket_t fd, int events)
{
	sigset_t	before;
	CURLMcode	code;
	int			running;

	if (fd == CURL_SOCKET_TIMEOUT)
		timer_set = false;

	block_signals(&before);
	code = curl_multi_socket_action(multi, fd, events, &running);
	unblock_signals(&before);
	return code;
}

static void
refuse_memory(void)
{
	ereport(ERROR,
			(errcode(ERRCODE_OUT_OF_MEMORY),
			 errmsg("out of memory"),
			 errdetail("libcurl could not be prepared for a request.")));
}

/* Initialize libcurl once per backend, and make the handles that stay. */
static void
initialize(void)
{
	static bool global = false;
	CURLcode	code;

	if (!global)
	{
		sigset_t	before;

		block_signals(&before);
		code = curl_global_init(CURL_GLOBAL_DEFAULT);
		unblock_signals(&before);
		if (code != CURLE_OK)
			ereport(ERROR,
					(errcode(ERRCODE_EXTERNAL_ROUTINE_EXCEPTION),
					 errmsg("could not initialize libcurl: %s", curl_easy_strerror(code))));
		global = true;
	}

	if (easy == NULL && (easy = curl_easy_init()) == NULL)
		refuse_memory();

	if (multi == NULL)
	{
		CURLM	   *new_multi = curl_multi_init();

		if (new_multi == NULL)
			refuse_memory();
		if (curl_multi_setopt(new_multi, CURLMOPT_SOCKETFUNCTION, watch_socket) != CURLM_OK ||
			curl_multi_setopt(new_multi, CURLMOPT_TIMERFUNCTION, set_timer) != CURLM_OK ||
			curl_multi_setopt(new_multi, CURLMOPT_MAXCONNECTS, 1L) != CURLM_OK)
		{
			curl_multi_cleanup(new_multi);
			refuse_memory();
		}
#if LIBCURL_VERSION_NUM >= 0x081400
		/* do not wait for its resolver's threads; see QUICK_EXIT below */
		(void) curl_multi_setopt(new_multi, CURLMOPT_QUICK_EXIT, 1L);
#endif
		multi = new_multi;
	}
}

/*
 * Close every connection.  One that libcurl keeps and we cannot look at is not
 * used again.
 */
static void
discard_connections(void)
{
	if (multi != NULL)
		curl_multi_cleanup(multi);
	multi = NULL;
	idle_socket = CURL_SOCKET_BAD;
}

/*
 * Is there something to read on the connection that is kept, or is it closed?
 */
static bool
idle_connection_is_spoilt(void)
{
	struct pollfd pfd;

	if (idle_socket == CURL_SOCKET_BAD)
		return false;
	pfd.fd = idle_socket;
	pfd.events = POLLIN;
	pfd.revents = 0;
	return poll(&pfd, 1, 0) != 0;
}

#define SET_OPTION(option, value) \
	do { \
		CURLcode	set_code = curl_easy_setopt(easy, option, value); \
\
		if (set_code != CURLE_OK) \
			ereport(ERROR, \
					(errcode(set_code == CURLE_OUT_OF_MEMORY ? \
							 ERRCODE_OUT_OF_MEMORY : ERRCODE_EXTERNAL_ROUTINE_EXCEPTION), \
					 errmsg("could not set libcurl's option %s: %s", \
							#option, curl_easy_strerror(set_code)))); \
	} while (0)

/*
 * Set the easy handle up.  The list of headers must live as long as the
 * transfer, and so must the body, the buffer for errors and *transfer.
 */
static void
set_options(Transfer *transfer, struct curl_slist *headers, char *errors)
{
	const HttpRequest *request = transfer->request;
	const char *protocols = transfer->plain ? "http" : "https";

	/* signals and longjmp are PostgreSQL's */
	SET_OPTION(CURLOPT_NOSIGNAL, 1L);
#if LIBCURL_VERSION_NUM >= 0x075700
	/* giving up does not wait for a name that is being resolved */
	SET_OPTION(CURLOPT_QUICK_EXIT, 1L);
#endif
	SET_OPTION(CURLOPT_ERRORBUFFER, errors);

	/* where to: the URL decides, and neither redirects nor the environment */
	SET_OPTION(CURLOPT_URL, request->url);
	SET_OPTION(CURLOPT_PATH_AS_IS, 1L);
#if LIBCURL_VERSION_NUM >= 0x075500
	SET_OPTION(CURLOPT_PROTOCOLS_STR, protocols);
	SET_OPTION(CURLOPT_REDIR_PROTOCOLS_STR, protocols);
#else
	SET_OPTION(CURLOPT_PROTOCOLS, (long) (transfer->plain ? CURLPROTO_HTTP : CURLPROTO_HTTPS));
	SET_OPTION(CURLOPT_REDIR_PROTOCOLS, (long) (transfer->plain ? CURLPROTO_HTTP : CURLPROTO_HTTPS));
	(void) protocols;
#endif
	SET_OPTION(CURLOPT_FOLLOWLOCATION, 0L);
	SET_OPTION(CURLOPT_DISALLOW_USERNAME_IN_URL, 1L);
	SET_OPTION(CURLOPT_PROXY, "");
	SET_OPTION(CURLOPT_NOPROXY, "*");
	SET_OPTION(CURLOPT_NETRC, (long) CURL_NETRC_IGNORED);

	/* to whom */
	SET_OPTION(CURLOPT_SSL_VERIFYPEER, 1L);
	SET_OPTION(CURLOPT_SSL_VERIFYHOST, 2L);
	SET_OPTION(CURLOPT_SSLVERSION, (long) CURL_SSLVERSION_TLSv1_2);
	if (request->ca_file != NULL)
		SET_OPTION(CURLOPT_CAINFO, request->ca_file);

	/* one connection, one request, one answer */
	SET_OPTION(CURLOPT_HTTP_VERSION, (long) CURL_HTTP_VERSION_1_1);
	SET_OPTION(CURLOPT_HTTP09_ALLOWED, 0L);
	SET_OPTION(CURLOPT_MAXAGE_CONN, (long) MAX_IDLE);
	SET_OPTION(CURLOPT_OPENSOCKETFUNCTION, open_socket);
	SET_OPTION(CURLOPT_OPENSOCKETDATA, transfer);
	SET_OPTION(CURLOPT_PREREQFUNCTION, before_request);
	SET_OPTION(CURLOPT_PREREQDATA, transfer);
	SET_OPTION(CURLOPT_TIMEOUT_MS, request->timeout);
	SET_OPTION(CURLOPT_CONNECTTIMEOUT_MS, request->connect_timeout);

	/* what */
	if (strcmp(request->method, "POST") == 0)
	{
		SET_OPTION(CURLOPT_POST, 1L);
		SET_OPTION(CURLOPT_POSTFIELDSIZE_LARGE, (curl_off_t) request->body_len);
		SET_OPTION(CURLOPT_POSTFIELDS, request->body != NULL ? request->body : "");
	}
	else
	{
		SET_OPTION(CURLOPT_HTTPGET, 1L);
		if (strcmp(request->method, "GET") != 0)
			SET_OPTION(CURLOPT_CUSTOMREQUEST, request->method);
	}
	SET_OPTION(CURLOPT_HTTPHEADER, headers);

	/* and what comes back */
	SET_OPTION(CURLOPT_HEADERFUNCTION, take_header);
	SET_OPTION(CURLOPT_HEADERDATA, transfer);
	SET_OPTION(CURLOPT_WRITEFUNCTION, take_body);
	SET_OPTION(CURLOPT_WRITEDATA, transfer);
}

/* Append a header; the list stays the caller's to free. */
static void
append_header(struct curl_slist *volatile *list, const char *header)
{
	struct curl_slist *longer = curl_slist_append(*list, header);

	if (longer == NULL)
		refuse_memory();
	*list = longer;
}

/* Append all headers of a request. */
static void
append_headers(struct curl_slist *volatile *list, const HttpRequest *request)
{
	const char *const *header;
	char	   *authorization;

	/* libcurl would add an Expect header to a large POST, and wait */
	append_header(list, "Expect:");
	for (header = request->headers; *header != NULL; header++)
		append_header(list, *header);

	authorization = psprintf("Authorization: Bearer %s", request->bearer);
	append_header(list, authorization);
	explicit_bzero(authorization, strlen(authorization));
	pfree(authorization);
}

/* Free a list of headers, one of which is a secret. */
static void
wipe_headers(struct curl_slist *list)
{
	struct curl_slist *item;

	for (item = list; item != NULL; item = item->next)
		explicit_bzero(item->data, strlen(item->data));
	curl_slist_free_all(list);
}

/* Milliseconds until libcurl wants to be called, at most MAX_WAIT. */
static long
time_to_wait(void)
{
	instr_time	now;

	if (!timer_set)
		return MAX_WAIT;
	INSTR_TIME_SET_CURRENT(now);
	INSTR_TIME_SUBTRACT(now, timer_start);
	return Max(0, Min(MAX_WAIT, timer_ms - (long) INSTR_TIME_GET_MILLISEC(now)));
}

/* Does libcurl wait for this socket? */
static bool
is_watched(curl_socket_t fd)
{
	int			i;

	for (i = 0; i < nsockets; i++)
	{
		if (sockets[i].fd == fd)
			return true;
	}
	return false;
}

/*
 * Make a set of all that ends a wait.  A socket cannot be removed from a set,
 * so a new one is made whenever libcurl waits for others.  It is the caller's
 * to free as soon as it exists: what follows may fail.
 */
static void
build_wait_set(WaitEventSet *volatile *set)
{
	int			i;

	if (*set != NULL)
	{
		WaitEventSet *old = *set;

		*set = NULL;
		FreeWaitEventSet(old);
	}

	*set = CreateWaitEventSetCompat(MAX_SOCKETS + 2);
	AddWaitEventToSet(*set, WL_LATCH_SET, PGINVALID_SOCKET, MyLatch, NULL);
	AddWaitEventToSet(*set, WL_EXIT_ON_PM_DEATH, PGINVALID_SOCKET, NULL, NULL);
	for (i = 0; i < nsockets; i++)
	{
		uint32		events = 0;

		if (sockets[i].what & CURL_POLL_IN)
			events |= WL_SOCKET_READABLE;
		if (sockets[i].what & CURL_POLL_OUT)
			events |= WL_SOCKET_WRITEABLE;
		if (events != 0)
			AddWaitEventToSet(*set, events, sockets[i].fd, NULL, NULL);
	}
	sockets_changed = false;
}

/*
 * Run the transfer to its end, and return libcurl's verdict.  *set is the
 * caller's to free.
 */
static CURLcode
run(WaitEventSet *volatile *set)
{
	CURLMcode	mcode = act(CURL_SOCKET_TIMEOUT, 0);

	if (wait_event == 0)
		wait_event = WAIT_EVENT_NEW("IdempotencyStripe");

	for (;;)
	{
		WaitEvent	events[MAX_SOCKETS + 2];
		CURLMsg    *message;
		int			nevents;
		int			left;
		int			i;

		if (mcode != CURLM_OK)
			ereport(ERROR,
					(errcode(ERRCODE_EXTERNAL_ROUTINE_EXCEPTION),
					 errmsg("libcurl failed: %s", curl_multi_strerror(mcode))));
		if (sockets_overflow)
			elog(ERROR, "libcurl waits for more than %d sockets", MAX_SOCKETS);

		while ((message = curl_multi_info_read(multi, &left)) != NULL)
		{
			if (message->msg == CURLMSG_DONE)
				return message->data.result;
		}

		CHECK_FOR_INTERRUPTS();

		if (*set == NULL || sockets_changed)
			build_wait_set(set);

		nevents = WaitEventSetWait(*set, time_to_wait(), events, lengthof(events), wait_event);
		for (i = 0; i < nevents && mcode == CURLM_OK; i++)
		{
			int			what = 0;

			if (events[i].events & WL_LATCH_SET)
			{
				ResetLatch(MyLatch);
				continue;
			}
			if (events[i].events & WL_SOCKET_READABLE)
				what |= CURL_CSELECT_IN;
			if (events[i].events & WL_SOCKET_WRITEABLE)
				what |= CURL_CSELECT_OUT;

			/* the event before it may have closed the socket */
			if (what != 0 && is_watched(events[i].fd))
				mcode = act(events[i].fd, what);
		}

		if (mcode == CURLM_OK && timer_set && time_to_wait() == 0)
			mcode = act(CURL_SOCKET_TIMEOUT, 0);
	}
}

/* Put the outcome of a transfer into its response. */
static void
take_result(Transfer *transfer, CURLcode code, const char *errors)
{
	HttpResponse *response = transfer->response;
	long		status = 0;
	long		connects = 1;

	curl_easy_getinfo(easy, CURLINFO_RESPONSE_CODE, &status);
	curl_easy_getinfo(easy, CURLINFO_NUM_CONNECTS, &connects);

	/* an interim answer does not count */
	response->status = status >= 200 ? (int) status : 0;
	response->body[response->body_len] = '\0';
	response->whole = (code == CURLE_OK && response->status != 0);
	response->stale = (response->sent && response->status == 0 && connects == 0);
	if (!response->whole)
		strlcpy(response->problem,
				transfer->refusal != NULL ? transfer->refusal :
				code == CURLE_OK ? "not an HTTP answer" :
				errors[0] != '\0' ? errors : curl_easy_strerror(code),
				sizeof(response->problem));
}

/* Account for file descriptors.  Returns false if the server has none left. */
static bool
acquire_fds(int n)
{
	int			i;

	for (i = 0; i < n; i++)
	{
		if (!AcquireExternalFD())
		{
			while (i-- > 0)
				ReleaseExternalFD();
			return false;
		}
	}
	return true;
}

static void
release_fds(int n)
{
	while (n-- > 0)
		ReleaseExternalFD();
}

/* Hand the transfer to libcurl. */
static void
start_transfer(void)
{
	sigset_t	before;
	CURLMcode	mcode;

	sockets_overflow = false;
	timer_set = false;
	block_signals(&before);
	mcode = curl_multi_add_handle(multi, easy);
	unblock_signals(&before);
	if (mcode != CURLM_OK)
		ereport(ERROR,
				(errcode(ERRCODE_EXTERNAL_ROUTINE_EXCEPTION),
				 errmsg("libcurl failed: %s", curl_multi_strerror(mcode))));
}

/*
 * Take the transfer out of libcurl, if it was started.  A connection is kept
 * only if the transfer was finished.  Raises nothing.
 */
static void
stop_transfer(bool started, bool finished)
{
	sigset_t	before;

	block_signals(&before);
	idle_socket = CURL_SOCKET_BAD;
	if (started)
	{
		if (finished)
			curl_easy_getinfo(easy, CURLINFO_ACTIVESOCKET, &idle_socket);
		(void) curl_multi_remove_handle(multi, easy);
	}
	if (idle_socket == CURL_SOCKET_BAD)
		discard_connections();
	if (easy != NULL)
		curl_easy_reset(easy);
	nsockets = 0;
	unblock_signals(&before);
}

/*
 * Send a request and wait for its answer.
 *
 * Whatever the network or the server does is told in *response, whose body is
 * in the current memory context.  Raises an error for an interrupt (a cancel)
 * or a lack of resources; response->sent is right then, too.
 */
static void
perform(const HttpRequest *request, HttpResponse *response)
{
	Transfer	transfer;
	struct curl_slist *volatile headers = NULL;
	WaitEventSet *volatile set = NULL;
	volatile bool started = false;
	volatile bool finished = false;
	char		errors[CURL_ERROR_SIZE] = "";

	memset(response, 0, sizeof(HttpResponse));
	memset(&transfer, 0, sizeof(transfer));
	transfer.request = request;
	transfer.response = response;
	transfer.context = CurrentMemoryContext;
	transfer.plain = strncmp(request->url, "https://", 8) != 0;
	transfer.body_size = Min(FIRST_BODY_SIZE, request->max_body + 1);
	response->body = palloc(transfer.body_size);
	response->body[0] = '\0';

	if (!kept_fds)
		kept_fds = acquire_fds(KEPT_FDS);
	if (!kept_fds || !acquire_fds(REQUEST_FDS))
	{
		strlcpy(response->problem, "too many open files in this backend", sizeof(response->problem));
		return;
	}

	PG_TRY();
	{
		CURLcode	code;

		if (idle_connection_is_spoilt())
			discard_connections();
		initialize();
		append_headers(&headers, request);
		set_options(&transfer, headers, errors);
		start_transfer();
		started = true;
		code = run(&set);
		take_result(&transfer, code, errors);
		finished = true;
	}
	PG_FINALLY();
	{
		stop_transfer(started, finished);
		wipe_headers(headers);
		if (set != NULL)
			FreeWaitEventSet(set);
		release_fds(REQUEST_FDS);
	}
	PG_END_TRY();
}

/* What idempotency.so looks up in this library. */
const HttpClient *
idempotency_http_client(void)
{
	static const HttpClient client = {HTTP_CLIENT_VERSION, perform};

	return &client;
}
