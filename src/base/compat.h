/*-------------------------------------------------------------------------
 *
 * compat.h
 *	  Differences between PostgreSQL majors: the only file that tests
 *	  PG_VERSION_NUM.
 *
 * Copyright (c) 2026, idempotency developers
 *
 * src/base/compat.h
 *
 *-------------------------------------------------------------------------
 */
#ifndef IDEMPOTENCY_COMPAT_H
#define IDEMPOTENCY_COMPAT_H

#include "access/genam.h"
#include "postmaster/bgworker.h"
#include "utils/relcache.h"
#include "utils/timestamp.h"
#include "utils/wait_event.h"

#if PG_VERSION_NUM < 150000
#error "idempotency needs PostgreSQL 15 or later"
#endif

/* 16 moved the varlena macros out of postgres.h */
#if PG_VERSION_NUM >= 160000
#include "varatt.h"
#endif

/*
 * 18: index_beginscan can count its work for EXPLAIN
 * 19: it also takes flags that say what the scan is for
 */
#if PG_VERSION_NUM >= 190000
#define index_beginscan_compat(heap, index, snapshot, nkeys) \
	index_beginscan(heap, index, snapshot, NULL, nkeys, 0, SO_NONE)
#elif PG_VERSION_NUM >= 180000
#define index_beginscan_compat(heap, index, snapshot, nkeys) \
	index_beginscan(heap, index, snapshot, NULL, nkeys, 0)
#else
#define index_beginscan_compat(heap, index, snapshot, nkeys) \
	index_beginscan(heap, index, snapshot, nkeys, 0)
#endif

/* 19: a table scan takes such flags, too */
#if PG_VERSION_NUM >= 190000
#define table_beginscan_compat(rel, snapshot) \
	table_beginscan(rel, snapshot, 0, NULL, SO_NONE)
#else
#define table_beginscan_compat(rel, snapshot) \
	table_beginscan(rel, snapshot, 0, NULL)
#endif

/* 16: all settings are returned as a copy, with their number */
#if PG_VERSION_NUM >= 160000
#define get_guc_variables_compat(n) get_guc_variables(n)
#else
#define get_guc_variables_compat(n) (*(n) = GetNumConfigOptions(), get_guc_variables())
#endif

/* 19: CREATE DATABASE and the like may terminate such a worker */
#ifndef BGWORKER_INTERRUPTIBLE
#define BGWORKER_INTERRUPTIBLE 0
#endif

/* 18: the caller says whether a deferrable primary key will do */
#if PG_VERSION_NUM >= 180000
#define RelationGetPrimaryKeyIndexCompat(rel) RelationGetPrimaryKeyIndex(rel, false)
#else
#define RelationGetPrimaryKeyIndexCompat(rel) RelationGetPrimaryKeyIndex(rel)
#endif

/* 17: backends are identified by their ProcNumber, also in virtual xids */
#if PG_VERSION_NUM >= 170000
#define MY_PROC_NUMBER MyProcNumber
#define VXID_PROC(vxid) ((vxid).procNumber)
#else
#define MY_PROC_NUMBER (MyProc->pgprocno)
#define VXID_PROC(vxid) ((vxid).backendId)
#endif

/* 17: wait events of extensions have names */
#if PG_VERSION_NUM >= 170000
#define WAIT_EVENT_NEW(name) WaitEventExtensionNew(name)
#else
#define WAIT_EVENT_NEW(name) PG_WAIT_EXTENSION
#endif

/* 17: intervals may be infinite */
#ifdef INTERVAL_NOT_FINITE
#define interval_is_infinite(span) INTERVAL_NOT_FINITE(span)
#else
#define interval_is_infinite(span) false
#endif

/* 17: a WaitEventSet belongs to a resource owner, or to nobody */
#if PG_VERSION_NUM >= 170000
#define CreateWaitEventSetCompat(nevents) CreateWaitEventSet(NULL, nevents)
#else
#define CreateWaitEventSetCompat(nevents) CreateWaitEventSet(TopMemoryContext, nevents)
#endif

/* 17: transaction_timeout */
#if PG_VERSION_NUM >= 170000
#define HAVE_TRANSACTION_TIMEOUT
#endif

/* 15.4: the connection limit of what an interrupted DROP DATABASE has left */
#ifndef DATCONNLIMIT_INVALID_DB
#define DATCONNLIMIT_INVALID_DB -2
#endif

/* 18: a module has a name and a version */
#define IDEMPOTENCY_VERSION "1.0"
#ifdef PG_MODULE_MAGIC_EXT
#define IDEMPOTENCY_MODULE_MAGIC \
	PG_MODULE_MAGIC_EXT(.name = "idempotency", .version = IDEMPOTENCY_VERSION)
#else
#define IDEMPOTENCY_MODULE_MAGIC PG_MODULE_MAGIC
#endif

/*
 * Write a message to the WAL for those who decode it.
 * 17: it can be flushed, too
 */
#if PG_VERSION_NUM >= 170000
#define log_message_compat(prefix) ((void) LogLogicalMessage(prefix, "", 0, false, false))
#else
#define log_message_compat(prefix) ((void) LogLogicalMessage(prefix, "", 0, false))
#endif

#endif							/* IDEMPOTENCY_COMPAT_H */
