/*-------------------------------------------------------------------------
 *
 * notify.h
 *	  NOTIFY by us.
 *
 * Copyright (c) 2026, idempotency developers
 *
 * src/base/notify.h
 *
 *-------------------------------------------------------------------------
 */
#ifndef IDEMPOTENCY_NOTIFY_H
#define IDEMPOTENCY_NOTIFY_H

extern void notify_at_commit(const char *channel, const char *payload);
extern void hint_at_commit(const char *channel, const char *payload);
extern void send_kept_notices(void);
extern void notice_init(void);

#endif							/* IDEMPOTENCY_NOTIFY_H */
