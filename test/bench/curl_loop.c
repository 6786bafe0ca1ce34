/*-------------------------------------------------------------------------
 *
 * curl_loop.c
 *	  What stripe_call() is compared with: libcurl, in a loop.
 *
 *	  curl_loop URL CALLS
 *
 * Sends the same request as the calls that are measured, on one connection that
 * is kept, and prints how many microseconds each took.  The first twenty, which
 * connect and warm up, are not counted.
 *
 * Copyright (c) 2026, idempotency developers
 *
 * test/bench/curl_loop.c
 *
 *-------------------------------------------------------------------------
 */
#include <stdio.h>
#include <stdlib.h>
#include <time.h>

#include <curl/curl.h>

#define WARM_UP 20

static const char body[] = "amount=2000&currency=eur&confirm=true&payment_method=pm_card_visa";

static size_t
ignore(char *data, size_t size, size_t nmemb, void *arg)
{
	(void) data;
	(void) arg;
	return size * nmemb;
}

int
main(int argc, char **argv)
{
	CURL	   *easy;
	int			calls = argc == 3 ? atoi(argv[2]) : 0;

	if (calls <= 0 || curl_global_init(CURL_GLOBAL_DEFAULT) != CURLE_OK || (easy = curl_easy_init()) == NULL)
	{
		fprintf(stderr, "usage: curl_loop URL CALLS\n");
		return 2;
	}

	for (int i = 0; i < WARM_UP + calls; i++)
	{
		struct curl_slist *headers = NULL;
		struct timespec start,
					end;
		char		key[100];
		CURLcode	code;

		clock_gettime(CLOCK_MONOTONIC, &start);
		snprintf(key, sizeof(key), "Idempotency-Key: bench:%d:02a41c4a-af11-8863-b4c9-6589d49e7436", i);
		headers = curl_slist_append(headers, "Expect:");
		headers = curl_slist_append(headers, "Authorization: Bearer sk_test_of_the_bench_0123456789");
		headers = curl_slist_append(headers, "Stripe-Version: 2026-10-28.endive");
		headers = curl_slist_append(headers, "User-Agent: curl_loop");
		headers = curl_slist_append(headers, key);
		curl_easy_setopt(easy, CURLOPT_URL, argv[1]);
		curl_easy_setopt(easy, CURLOPT_POSTFIELDS, body);
		curl_easy_setopt(easy, CURLOPT_HTTPHEADER, headers);
		curl_easy_setopt(easy, CURLOPT_PROXY, "");
		curl_easy_setopt(easy, CURLOPT_WRITEFUNCTION, ignore);
		code = curl_easy_perform(easy);
		curl_easy_reset(easy);
		curl_slist_free_all(headers);
		clock_gettime(CLOCK_MONOTONIC, &end);

		if (code != CURLE_OK)
		{
			fprintf(stderr, "curl_loop: %s\n", curl_easy_strerror(code));
			return 1;
		}
		if (i >= WARM_UP)
			printf("%.1f\n", (end.tv_sec - start.tv_sec) * 1e6 + (end.tv_nsec - start.tv_nsec) / 1e3);
	}
	return 0;
}
