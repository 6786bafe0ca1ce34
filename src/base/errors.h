/*-------------------------------------------------------------------------
 *
 * errors.h
 *	  SQLSTATEs of the extension, class IK.
 *
 * Copyright (c) 2026, idempotency developers
 *
 * src/base/errors.h
 *
 *-------------------------------------------------------------------------
 */
#ifndef IDEMPOTENCY_ERRORS_H
#define IDEMPOTENCY_ERRORS_H

#include "utils/elog.h"

#define ERRCODE_STALE_TOKEN				MAKE_SQLSTATE('I', 'K', '0', '0', '1')
#define ERRCODE_CONTRADICTS_RECORD		MAKE_SQLSTATE('I', 'K', '0', '0', '2')
#define ERRCODE_BAD_ARGUMENT			MAKE_SQLSTATE('I', 'K', '0', '0', '3')
#define ERRCODE_WEBHOOK_REFUSED			MAKE_SQLSTATE('I', 'K', '0', '0', '4')
#define ERRCODE_CLAIM_LEFT_OPEN			MAKE_SQLSTATE('I', 'K', '0', '0', '5')
#define ERRCODE_NOT_IN_TRANSACTION		MAKE_SQLSTATE('I', 'K', '0', '0', '6')
#define ERRCODE_TOO_LARGE				MAKE_SQLSTATE('I', 'K', '0', '0', '7')
#define ERRCODE_NO_RECORDER				MAKE_SQLSTATE('I', 'K', '0', '0', '8')
#define ERRCODE_FOREIGN_NAMESPACE		MAKE_SQLSTATE('I', 'K', '0', '0', '9')
#define ERRCODE_STRIPE_NOT_INSTALLED	MAKE_SQLSTATE('I', 'K', '0', '1', '0')
#define ERRCODE_SETTING_LOST			MAKE_SQLSTATE('I', 'K', '0', '1', '1')

#endif							/* IDEMPOTENCY_ERRORS_H */
