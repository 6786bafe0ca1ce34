/*-------------------------------------------------------------------------
 *
 * launcher.h
 *	  The launcher of the background workers.
 *
 * src/launcher.h
 *
 *-------------------------------------------------------------------------
 */
#ifndef IDEMPOTENCY_LAUNCHER_H
#define IDEMPOTENCY_LAUNCHER_H

extern void launcher_register(void);

#endif							/* IDEMPOTENCY_LAUNCHER_H */
