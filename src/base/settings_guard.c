/*-------------------------------------------------------------------------
 *
 * settings_guard.c
 *	  Settings whose value was refused when the library was loaded.
 *
 * Before the library is loaded, PostgreSQL keeps a setting of ours as a
 * placeholder: a string that anybody may set.  It has one value for each
 * source at most the highest of which counts (file, database, role, client,
 * session), so that a client's connection option takes the place of what the
 * file and the role say.  When the library defines the setting, PostgreSQL
 * gives it the placeholder's value, if whoever has set that may do so and if
 * it is valid; otherwise it warns, and the built-in default stays, which allows
 * more than the value that is lost.
 *
 * So a setting that needs a privilege (PGC_SUSET) and lost a value is not to be
 * relied on, and nothing that may read one is done (IK011).  Its placeholder
 * and what became of it are compared here; if everything was accepted, they
 * are alike.  There are three cases:
 *
 *	- The value that RESET goes back to was refused.  Whatever it had taken
 *	  the place of can't be known, until a value of the same or a higher source
 *	  is accepted: a superuser's SET where the connection's option was refused,
 *	  but not a reload of the file, since the role may have had a stricter one.
 *
 *	- A value that was SET for the session was refused.  It may have taken the
 *	  place of one that was set with the privilege, by a function of somebody
 *	  else's.  So it is the same until a SET is accepted.
 *
 *	- Only a value of the transaction under way was refused: of SET LOCAL, of a
 *	  function's SET clause or, while nobody knows whether it commits, of SET.
 *	  Had the library been loaded, that would have been an error and the end of
 *	  the transaction, which it therefore counts for.
 *
 * None of that is known in a parallel worker, which is given the settings that
 * the leader ended up with.  Nothing of ours is meant to be called there.
 *
 * Where the library is preloaded, the postmaster defines the settings, from
 * placeholders of its file; those only an invalid value there concerns.
 *
 * Copyright (c) 2026, idempotency developers
 *
 * src/base/settings_guard.c
 *
 *-------------------------------------------------------------------------
 */
#include "postgres.h"

#include "access/parallel.h"
#include "access/xact.h"
#include "utils/guc.h"
#include "utils/guc_tables.h"
#include "utils/memutils.h"

#include "base/compat.h"
#include "base/errors.h"
#include "base/settings_guard.h"

#define PREFIX "idempotency."

/* Who has set a value, and from where. */
typedef struct Origin
{
	GucSource	source;
	GucContext	context;
	Oid			role;
} Origin;

typedef struct Placeholder
{
	char	   *name;
	Origin		current;
	Origin		reset;
	int			depth;			/* of the stack of values to go back to */
	bool		set;			/* by a SET that would outlive the transaction? */
} Placeholder;

/* A setting that has lost a value. */
typedef struct Loss
{
	struct config_generic *setting;
	GucSource	source;			/* of the refused value that lasts, or
								 * PGC_S_DEFAULT */
	bool		in_transaction; /* was one of the transaction's own refused? */
	bool		lasts;			/* and becomes the session's if it commits? */
} Loss;

static List *placeholders = NIL;
static Loss *losses = NULL;
static int	nlosses = 0;

static Origin
current_origin(const struct config_generic *setting)
{
	Origin		origin = {setting->source, setting->scontext, setting->srole};

	return origin;
}

static Origin
reset_origin(const struct config_generic *setting)
{
	Origin		origin = {setting->reset_source, setting->reset_scontext, setting->reset_srole};

	return origin;
}

static bool
same_origin(const Origin *a, const Origin *b)
{
	return a->source == b->source && a->context == b->context && a->role == b->role;
}

static int
stack_depth(const struct config_generic *setting)
{
	const GucStack *item;
	int			depth = 0;

	for (item = setting->stack; item != NULL; item = item->prev)
		depth++;
	return depth;
}

static bool
is_set(const struct config_generic *setting)
{
	const GucStack *item;

	for (item = setting->stack; item != NULL; item = item->prev)
	{
		if (item->state == GUC_SET || item->state == GUC_SET_LOCAL)
			return true;
	}
	return false;
}

/* Note the placeholders of our settings, before these are defined. */
void
settings_guard_begin(void)
{
	int			n;
	struct config_generic **settings = get_guc_variables_compat(&n);
	int			i;

	/* what an attempt to load that failed has left */
	placeholders = NIL;
	nlosses = 0;

	for (i = 0; i < n; i++)
	{
		Placeholder *placeholder;

		if ((settings[i]->flags & GUC_CUSTOM_PLACEHOLDER) == 0 ||
			pg_strncasecmp(settings[i]->name, PREFIX, strlen(PREFIX)) != 0)
			continue;
		placeholder = palloc(sizeof(Placeholder));
		placeholder->name = pstrdup(settings[i]->name);
		placeholder->current = current_origin(settings[i]);
		placeholder->reset = reset_origin(settings[i]);
		placeholder->depth = stack_depth(settings[i]);
		placeholder->set = is_set(settings[i]);
		placeholders = lappend(placeholders, placeholder);
	}
}

/* What is refused in a transaction counts until its end. */
static void
at_xact_end(XactEvent event, void *arg)
{
	int			i;

	if (event != XACT_EVENT_COMMIT && event != XACT_EVENT_ABORT && event != XACT_EVENT_PREPARE)
		return;
	for (i = 0; i < nlosses; i++)
	{
		if (losses[i].lasts && event != XACT_EVENT_ABORT)
			losses[i].source = PGC_S_SESSION;
		losses[i].in_transaction = losses[i].lasts = false;
	}
}

static void
note_loss(struct config_generic *setting, const Placeholder *placeholder)
{
	Origin		current = current_origin(setting);
	Origin		reset = reset_origin(setting);
	Loss	   *loss = &losses[nlosses];
	bool		refused;

	/* RESET in a transaction has a stack, too, which nothing is left of */
	refused = placeholder->current.source == PGC_S_SESSION &&
		(!same_origin(&current, &placeholder->current) ||
		 stack_depth(setting) != placeholder->depth);

	loss->setting = setting;
	loss->source = same_origin(&reset, &placeholder->reset) ? PGC_S_DEFAULT :
		placeholder->reset.source;
	if (refused && placeholder->depth == 0)
		loss->source = PGC_S_SESSION;
	loss->in_transaction = refused && placeholder->depth > 0;
	loss->lasts = loss->in_transaction && placeholder->set;

	if (loss->source != PGC_S_DEFAULT || loss->in_transaction)
		nlosses++;
	if (loss->in_transaction)
		RegisterXactCallback(at_xact_end, NULL);
}

/* To be called when they are: finds out which have lost a value by it. */
void
settings_guard_end(void)
{
	struct config_generic **settings;
	ListCell   *lc;
	int			n;
	int			i;

	if (placeholders == NIL)
		return;

	settings = get_guc_variables_compat(&n);
	losses = MemoryContextAlloc(TopMemoryContext, list_length(placeholders) * sizeof(Loss));
	foreach(lc, placeholders)
	{
		Placeholder *placeholder = lfirst(lc);

		for (i = 0; i < n; i++)
		{
			if (settings[i]->context == PGC_SUSET &&
				pg_strcasecmp(settings[i]->name, placeholder->name) == 0)
				note_loss(settings[i], placeholder);
		}
	}
	list_free_deep(placeholders);
	placeholders = NIL;
}

/*
 * For the recorder, whose orders bring along what it needs: what was sent is
 * recorded, whatever the settings.
 */
void
settings_guard_disarm(void)
{
	nlosses = 0;
}

/*
 * Raise IK011 if a setting that guards something has lost its value.  To be
 * called before anything is claimed, verified, sent or removed.
 */
void
check_settings(void)
{
	int			i;

	if (IsParallelWorker())
		ereport(ERROR,
				(errcode(ERRCODE_INVALID_TRANSACTION_STATE),
				 errmsg("cannot call functions of extension %s during a parallel operation",
						"idempotency")));

	for (i = 0; i < nlosses; i++)
	{
		const Loss *loss = &losses[i];

		if (!loss->in_transaction && loss->setting->source >= loss->source)
			continue;
		ereport(ERROR,
				(errcode(ERRCODE_SETTING_LOST),
				 errmsg("value of parameter \"%s\" is not known in this session",
						loss->setting->name),
				 errdetail("What it was set to by source \"%s\" was refused when the library was loaded, and has taken the place of the value that was to be in force.",
						   GucSource_Names[loss->in_transaction ? PGC_S_SESSION : loss->source]),
				 errhint("Connect again without setting it there, or correct the value. With idempotency in \"shared_preload_libraries\" it cannot be set without the privilege at all.")));
	}
}
