/*-------------------------------------------------------------------------
 *
 * settings_guard.h
 *	  Settings whose value was refused when the library was loaded.
 *
 * Copyright (c) 2026, idempotency developers
 *
 * src/base/settings_guard.h
 *
 *-------------------------------------------------------------------------
 */
#ifndef IDEMPOTENCY_SETTINGS_GUARD_H
#define IDEMPOTENCY_SETTINGS_GUARD_H

extern void settings_guard_begin(void);
extern void settings_guard_end(void);
extern void settings_guard_disarm(void);
extern void check_settings(void);

#endif							/* IDEMPOTENCY_SETTINGS_GUARD_H */
