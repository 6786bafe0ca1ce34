/*-------------------------------------------------------------------------
 *
 * drop_database.h
 *	  What happens at DROP DATABASE.
 *
 * Copyright (c) 2026, idempotency developers
 *
 * src/process/drop_database.h
 *
 *-------------------------------------------------------------------------
 */
#ifndef IDEMPOTENCY_DROP_DATABASE_H
#define IDEMPOTENCY_DROP_DATABASE_H

extern void drop_database_init(void);

#endif							/* IDEMPOTENCY_DROP_DATABASE_H */
