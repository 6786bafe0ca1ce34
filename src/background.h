/*-------------------------------------------------------------------------
 *
 * background.h
 *	  Settings that all background processes have.
 *
 * src/background.h
 *
 *-------------------------------------------------------------------------
 */
#ifndef IDEMPOTENCY_BACKGROUND_H
#define IDEMPOTENCY_BACKGROUND_H

extern void background_set(const char *name, const char *value);
extern void background_fix_settings(void);

#endif							/* IDEMPOTENCY_BACKGROUND_H */
