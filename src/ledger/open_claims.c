/*-------------------------------------------------------------------------
 *
 * open_claims.c
 *	  Claims that belong to the current transaction.
 *
 * A claim made without a lease must be recorded or released before its
 * transaction commits.  COMMIT and PREPARE TRANSACTION fail (IK005) while one
 * is open; otherwise a forgotten call of record() would be noticed only in
 * production, by a second execution.
 *
 * When a savepoint is rolled back, what was claimed in it is closed again, and
 * what was recorded in it is open again.  So every change of the set is an
 * entry in a journal, with the subtransaction it was made in.  The abort of a
 * subtransaction undoes its entries from the end, its commit passes them to
 * the parent.  Subtransaction ids only grow, hence the entries of a
 * subtransaction and of all that it contained are those at the end with an id
 * not below its own.  Each entry is looked at once per level, so the cost of a
 * transaction grows linearly with its claims.
 *
 * All memory is in TopTransactionContext; nothing outlives the transaction.
 *
 * Copyright (c) 2026, idempotency developers
 *
 * src/ledger/open_claims.c
 *
 *-------------------------------------------------------------------------
 */
#include "postgres.h"

#include "access/xact.h"
#include "utils/hsearch.h"
#include "utils/memutils.h"

#include "base/errors.h"
#include "base/settings.h"
#include "ledger/open_claims.h"

typedef struct OpenClaim
{
	int64		token;			/* hash key */
	bool		open;
	const char *what;			/* "idempotency key" */
	char	   *name;			/* which one, quoted, for the message */
} OpenClaim;

typedef struct JournalEntry
{
	int64		token;
	SubTransactionId subid;
	bool		opened;			/* or closed */
} JournalEntry;

static HTAB *claims = NULL;
static long nopen = 0;
static JournalEntry *journal = NULL;
static int	njournal = 0;
static int	maxjournal = 0;

static void at_xact_event(XactEvent event, void *arg);

/*
 * Be the first callback when the transaction ends.  Callbacks are called in the
 * reverse order of their registration, and what another one has committed on a
 * foreign server before we refuse cannot be undone.
 */
static void
register_as_first(void)
{
	UnregisterXactCallback(at_xact_event, NULL);
	RegisterXactCallback(at_xact_event, NULL);
}

/* Make room for one more entry; after this add_to_journal() cannot fail. */
static void
reserve_journal(void)
{
	if (njournal >= maxjournal)
	{
		journal = repalloc_huge(journal, 2 * (Size) maxjournal * sizeof(JournalEntry));
		maxjournal *= 2;
	}
}

static void
add_to_journal(int64 token, bool opened)
{
	journal[njournal].token = token;
	journal[njournal].subid = GetCurrentSubTransactionId();
	journal[njournal].opened = opened;
	njournal++;
}

/*
 * Note that the current (sub)transaction has claimed something without a lease.
 * "what" must be a constant; "name" is copied.
 */
void
open_claims_add(int64 token, const char *what, const char *name)
{
	OpenClaim  *claim;
	char	   *copy;

	if (claims == NULL)
	{
		HASHCTL		ctl;

		register_as_first();
		ctl.keysize = sizeof(int64);
		ctl.entrysize = sizeof(OpenClaim);
		ctl.hcxt = TopTransactionContext;
		maxjournal = 16;
		journal = MemoryContextAlloc(TopTransactionContext,
									 maxjournal * sizeof(JournalEntry));
		claims = hash_create("idempotency open claims", 16, &ctl,
							 HASH_ELEM | HASH_BLOBS | HASH_CONTEXT);
	}

	copy = MemoryContextStrdup(TopTransactionContext, name);
	reserve_journal();
	claim = hash_search(claims, &token, HASH_ENTER, NULL);
	claim->open = true;
	claim->what = what;
	claim->name = copy;
	nopen++;
	add_to_journal(token, true);
}

/*
 * Note that the current (sub)transaction has recorded or released the claim
 * with this token, or given it a lease.
 */
void
open_claims_remove(int64 token)
{
	OpenClaim  *claim;

	if (claims == NULL)
		return;
	claim = hash_search(claims, &token, HASH_FIND, NULL);
	if (claim == NULL || !claim->open)
		return;

	reserve_journal();
	claim->open = false;
	nopen--;
	add_to_journal(token, false);
}

/* Is this the token of a claim of this transaction that is still open? */
bool
open_claims_contain(int64 token)
{
	OpenClaim  *claim;

	if (claims == NULL)
		return false;
	claim = hash_search(claims, &token, HASH_FIND, NULL);
	return claim != NULL && claim->open;
}

/* Tokens of all claims of this transaction that are still open, palloc'd. */
int64 *
open_claims_tokens(int *n)
{
	int64	   *tokens = palloc((nopen + 1) * sizeof(int64));
	HASH_SEQ_STATUS status;
	OpenClaim  *claim;

	*n = 0;
	if (claims == NULL)
		return tokens;
	hash_seq_init(&status, claims);
	while ((claim = hash_seq_search(&status)) != NULL)
	{
		if (claim->open)
			tokens[(*n)++] = claim->token;
	}
	return tokens;
}

static void
forget_all(void)
{
	claims = NULL;
	nopen = 0;
	journal = NULL;
	njournal = 0;
	maxjournal = 0;
}

static void
check_none_open(void)
{
	HASH_SEQ_STATUS status;
	OpenClaim  *claim;
	OpenClaim  *first = NULL;
	int			i;

	if (nopen == 0 || setting_open_claim_at_commit == OPEN_CLAIM_ALLOW)
		return;

	/* name the one that was claimed first */
	for (i = 0; i < njournal && first == NULL; i++)
	{
		claim = hash_search(claims, &journal[i].token, HASH_FIND, NULL);
		if (claim != NULL && claim->open)
			first = claim;
	}
	if (first == NULL)
	{
		hash_seq_init(&status, claims);
		while ((claim = hash_seq_search(&status)) != NULL)
		{
			if (claim->open)
				first = claim;
		}
	}

	/* NOLINTNEXTLINE(clang-analyzer-core.NullDereference): nopen > 0 */
	ereport(setting_open_claim_at_commit == OPEN_CLAIM_ERROR ? ERROR : WARNING,
			(errcode(ERRCODE_CLAIM_LEFT_OPEN),
			 errmsg("%s %s was claimed but neither recorded nor released",
					first->what, first->name),
			 nopen > 1 ? errdetail_plural("%ld more claim of this transaction is open.",
										  "%ld more claims of this transaction are open.",
										  nopen - 1, nopen - 1) : 0,
			 IsTransactionBlock() ?
			 errhint("Record the result or release the key before COMMIT, or claim it with a lease.") :
			 errhint("A statement outside of BEGIN and COMMIT is a transaction of its own: record the result in the same transaction, or claim with a lease.")));
}

static void
at_xact_event(XactEvent event, void *arg)
{
	switch (event)
	{
		case XACT_EVENT_PRE_COMMIT:
		case XACT_EVENT_PRE_PREPARE:
			if (claims != NULL)
				check_none_open();
			break;
		case XACT_EVENT_COMMIT:
		case XACT_EVENT_ABORT:
		case XACT_EVENT_PREPARE:
			forget_all();
			break;
		default:
			break;
	}
}

static void
at_subxact_event(SubXactEvent event, SubTransactionId subid,
				 SubTransactionId parent, void *arg)
{
	int			i;

	if (claims == NULL)
		return;

	if (event == SUBXACT_EVENT_COMMIT_SUB)
	{
		for (i = njournal - 1; i >= 0 && journal[i].subid >= subid; i--)
			journal[i].subid = parent;
	}
	else if (event == SUBXACT_EVENT_ABORT_SUB)
	{
		while (njournal > 0 && journal[njournal - 1].subid >= subid)
		{
			JournalEntry *entry = &journal[--njournal];
			OpenClaim  *claim = hash_search(claims, &entry->token, HASH_FIND, NULL);

			Assert(claim != NULL && claim->open == entry->opened);
			if (entry->opened)
			{
				nopen--;
				hash_search(claims, &entry->token, HASH_REMOVE, NULL);
			}
			else
			{
				nopen++;
				claim->open = true;
			}
		}
	}
}

/* Register the callbacks; called once, when the library is loaded. */
void
open_claims_init(void)
{
	register_as_first();
	RegisterSubXactCallback(at_subxact_event, NULL);
}
