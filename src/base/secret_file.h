/*-------------------------------------------------------------------------
 *
 * secret_file.h
 *	  Files and environment variables that hold secrets.
 *
 * Copyright (c) 2026, idempotency developers
 *
 * src/base/secret_file.h
 *
 *-------------------------------------------------------------------------
 */
#ifndef IDEMPOTENCY_SECRET_FILE_H
#define IDEMPOTENCY_SECRET_FILE_H

#include "nodes/pg_list.h"
#include "utils/guc.h"

extern void secret_file_load(const char *path, const char *what, char *buffer, size_t size);
extern List *secret_file_read(const char *path);
extern List *secret_environment_read(const char *variable);
extern const char *secret_problem(const char *secret, size_t len);
extern bool secret_file_check_setting(char **newval, void **extra, GucSource source);

#endif							/* IDEMPOTENCY_SECRET_FILE_H */
