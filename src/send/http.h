/*-------------------------------------------------------------------------
 *
 * http.h
 *	  One HTTP request, as the rest of the extension sees it.
 *
 * This is all that idempotency.so and idempotency_stripe.so know of each
 * other: the second hands out an HttpClient, and calls nothing of the first.
 *
 * Copyright (c) 2026, idempotency developers
 *
 * src/send/http.h
 *
 *-------------------------------------------------------------------------
 */
#ifndef IDEMPOTENCY_HTTP_H
#define IDEMPOTENCY_HTTP_H

#include "stripe/stripe_outcome.h"

/* A request; its strings must live until it is answered. */
typedef struct HttpRequest
{
	const char *method;			/* GET, POST or DELETE */
	const char *url;
	const char *const *headers; /* each "Name: value", up to a NULL */
	const char *bearer;			/* secret of the Authorization header */
	const char *body;			/* of a POST */
	size_t		body_len;
	long		timeout;		/* of everything, in milliseconds */
	long		connect_timeout;	/* of that, until the connection is
								 * established */
	size_t		max_body;		/* largest answer, in bytes */
	const char *ca_file;		/* certificates to trust, or NULL for the
								 * system's */
	void		(*sending) (void);	/* called immediately before the first
									 * byte leaves, or NULL; must raise
									 * nothing */
} HttpRequest;

#define HTTP_TEXT_MAX 256

/*
 * What became of a request.  "sent" and "status" are right at any moment, so
 * also after an error has ended it.
 */
typedef struct HttpResponse
{
	bool		sent;			/* may a byte of the request have left? */
	bool		whole;			/* has a whole answer arrived? */
	bool		too_large;		/* not whole, because over max_body */
	bool		stale;			/* no answer, from a connection that was kept
								 * from an earlier request */
	int			status;			/* HTTP status, 0 without an answer */
	char	   *body;			/* what there is of it, '\0'-terminated, in
								 * the caller's memory context */
	size_t		body_len;
	char		request_id[HTTP_TEXT_MAX];	/* Request-Id, or empty */
	StripeShouldRetry should_retry; /* Stripe-Should-Retry */
	bool		replayed;		/* Idempotent-Replayed: true */
	char		problem[HTTP_TEXT_MAX]; /* why there is no whole answer */
} HttpResponse;

/* What the library hands out.  It grows at its end, with another version. */
#define HTTP_CLIENT_VERSION 1

typedef struct HttpClient
{
	int			version;
	void		(*perform) (const HttpRequest *request, HttpResponse *response);
} HttpClient;

typedef const HttpClient *(*HttpClientFunction) (void);

#define HTTP_CLIENT_LIBRARY "idempotency_stripe"
#define HTTP_CLIENT_FUNCTION "idempotency_http_client"

#endif							/* IDEMPOTENCY_HTTP_H */
