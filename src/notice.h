/*-------------------------------------------------------------------------
 *
 * notice.h
 *	  NOTIFY by us.
 *
 * src/notice.h
 *
 *-------------------------------------------------------------------------
 */
#ifndef IDEMPOTENCY_NOTICE_H
#define IDEMPOTENCY_NOTICE_H

extern void notify_at_commit(const char *channel, const char *payload);
extern void hint_at_commit(const char *channel, const char *payload);
extern void send_kept_notices(void);
extern void notice_init(void);

#endif							/* IDEMPOTENCY_NOTICE_H */
