/*-------------------------------------------------------------------------
 *
 * notify.h
 *	  NOTIFY by the extension.
 *
 * Copyright (c) 2026, idempotency developers
 *
 * src/base/notify.h
 *
 *-------------------------------------------------------------------------
 */
#ifndef IDEMPOTENCY_NOTIFY_H
#define IDEMPOTENCY_NOTIFY_H

/*
 * Whoever has workers sent to the notices of prepared transactions.  Neither
 * may raise an error once its transaction has committed.
 */
typedef struct NoticeCallbacks
{
	void		(*kept) (void); /* this transaction, which is being prepared,
								 * leaves some */
	void		(*may_be_due) (void);	/* a prepared transaction has committed */
} NoticeCallbacks;

extern void notify_at_commit(const char *channel, const char *payload);
extern void hint_at_commit(const char *channel, const char *payload);
extern void send_kept_notices(void);
extern void notice_init(const NoticeCallbacks *to_call);

#endif							/* IDEMPOTENCY_NOTIFY_H */
