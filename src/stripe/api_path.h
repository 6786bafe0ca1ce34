/*-------------------------------------------------------------------------
 *
 * api_path.h
 *	  Paths of Stripe's API, and which of them may be called.
 *
 * Copyright (c) 2026, idempotency developers
 *
 * src/stripe/api_path.h
 *
 *-------------------------------------------------------------------------
 */
#ifndef IDEMPOTENCY_API_PATH_H
#define IDEMPOTENCY_API_PATH_H

extern const char *path_problem(const char *path);
extern bool path_is_v2(const char *path);
extern bool path_takes_metadata(const char *path);
extern const char *path_list_problem(const char *list);
extern bool path_is_allowed(const char *list, const char *method, const char *path);
extern const char *api_base_problem(const char *base);
extern const char *api_version_problem(const char *version);

#endif							/* IDEMPOTENCY_API_PATH_H */
