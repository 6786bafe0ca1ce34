# idempotency: PostgreSQL extension that makes retries safe

EXTENSION = idempotency
DATA = idempotency--1.0.sql
PGFILEDESC = "idempotency - keys for requests received and calls sent"

MODULE_big = idempotency
OBJS = \
	$(WIN32RES) \
	src/grant_role.o \
	src/idempotency.o \
	src/base/arguments.o \
	src/base/debug_point.o \
	src/base/fingerprint.o \
	src/base/json_build.o \
	src/base/json_member.o \
	src/base/json_text.o \
	src/base/lock_limit.o \
	src/base/mac.o \
	src/base/notify.o \
	src/base/owner_spi.o \
	src/base/result_row.o \
	src/base/secret_file.o \
	src/base/settings.o \
	src/base/settings_guard.o \
	src/base/shmem.o \
	src/base/subtransaction.o \
	src/calls/call_transactions.o \
	src/calls/settle_by_event.o \
	src/calls/settle_by_hand.o \
	src/calls/stripe_claim.o \
	src/calls/stripe_expiry.o \
	src/calls/stripe_fate.o \
	src/calls/stripe_ledger.o \
	src/calls/stripe_record.o \
	src/events/call_sweep.o \
	src/events/kept_events.o \
	src/events/webhook_ledger.o \
	src/events/webhook_payload.o \
	src/events/webhook_queue.o \
	src/events/webhook_secret.o \
	src/events/webhooks.o \
	src/ledger/derived_key.o \
	src/ledger/expiry.o \
	src/ledger/ledger.o \
	src/ledger/ledger_search.o \
	src/ledger/namespace.o \
	src/ledger/open_claims.o \
	src/ledger/request_claim.o \
	src/ledger/request_fingerprint.o \
	src/ledger/request_ledger.o \
	src/ledger/requests.o \
	src/process/abandoned_orders.o \
	src/process/background_process.o \
	src/process/drop_database.o \
	src/process/expire.o \
	src/process/launcher.o \
	src/process/recorder_client.o \
	src/process/recorder_message.o \
	src/process/recorder_process.o \
	src/process/recorder_queue.o \
	src/process/recorder_start.o \
	src/process/worker.o \
	src/process/worker_pass.o \
	src/process/worker_run.o \
	src/process/worker_states.o \
	src/process/worker_table.o \
	src/send/api_key.o \
	src/send/http_client.o \
	src/send/reconcile.o \
	src/send/reconcile_evidence.o \
	src/send/reconcile_search.o \
	src/send/stripe_call.o \
	src/send/stripe_functions.o \
	src/send/stripe_request.o \
	src/stripe/api_path.o \
	src/stripe/form.o \
	src/stripe/stripe_answer.o \
	src/stripe/stripe_effect.o \
	src/stripe/stripe_lookup.o \
	src/stripe/stripe_outcome.o \
	src/stripe/webhook_event.o \
	src/stripe/webhook_signature.o

# the HTTP client, a library of its own: only it needs libcurl
STRIPE_LIBRARY = idempotency_stripe$(DLSUFFIX)
STRIPE_OBJS = src/send/http.o
CURL_CONFIG ?= curl-config

PG_CPPFLAGS = -I$(srcdir)/src
# Off are: unused parameters, because hooks and callbacks have the server's
# signatures; comparisons of int with size_t, because lengthof() is one and
# loops count in int, as in PostgreSQL; missing initializers, because a
# statement's saved plan begins as NULL and isn't written out.
PG_CFLAGS = -Wall -Wextra -Wno-unused-parameter -Wno-sign-compare -Wno-missing-field-initializers

# our own symbols win over the server's, should a minor release export one of their names
PG_LDFLAGS = $(if $(filter Linux,$(shell uname -s)),-Wl$(comma)-Bsymbolic)
comma := ,

# pg_regress: sql/, expected/; isolation and TAP: test/
tests := $(patsubst sql/%.sql,%,$(sort $(wildcard sql/*.sql)))
REGRESS := $(filter install,$(tests)) $(filter-out install cleanup,$(tests)) $(filter cleanup,$(tests))
ISOLATION := $(patsubst test/specs/%.spec,%,$(sort $(wildcard test/specs/*.spec)))
ISOLATION_OPTS = --inputdir=test
TAP_TESTS = 1
PROVE_TESTS = test/t/*.pl
override PROVE_FLAGS += -I test/perl
ENCODING = UTF8
NO_LOCALE = 1

# where there is no server to build against yet, "make test" and "make demo" work
PG_CONFIG ?= pg_config
PGXS := $(shell $(PG_CONFIG) --pgxs 2>/dev/null)
ifneq ($(wildcard $(PGXS)),)
include $(PGXS)
$(OBJS) $(STRIPE_OBJS): $(wildcard src/*/*.h)

ifneq ($(shell $(CURL_CONFIG) --version 2>/dev/null),)
$(STRIPE_OBJS): CPPFLAGS += $(shell $(CURL_CONFIG) --cflags)

$(STRIPE_LIBRARY): $(STRIPE_OBJS)
	$(LINK.shared) -o $@ $(STRIPE_OBJS) $(LDFLAGS) $(LDFLAGS_SL) $(shell $(CURL_CONFIG) --libs)

all: $(STRIPE_LIBRARY)

install: install-stripe
.PHONY: install-stripe
install-stripe: $(STRIPE_LIBRARY) installdirs-lib
	$(INSTALL_SHLIB) $< '$(DESTDIR)$(pkglibdir)/$(STRIPE_LIBRARY)'
else
all: without-stripe
.PHONY: without-stripe
without-stripe:
	@echo "$(STRIPE_LIBRARY) is not built, so no function calls Stripe: $(CURL_CONFIG) is missing" >&2
	@echo "(on Debian libcurl4-openssl-dev)." >&2
endif

uninstall: uninstall-stripe
.PHONY: uninstall-stripe
uninstall-stripe:
	rm -f '$(DESTDIR)$(pkglibdir)/$(STRIPE_LIBRARY)'

clean: clean-stripe
.PHONY: clean-stripe
clean-stripe:
	rm -f $(STRIPE_LIBRARY) $(STRIPE_OBJS)
else
all install uninstall installcheck check clean:
	@echo "$@: $(PG_CONFIG) names no PGXS: install PostgreSQL's server development files" >&2
	@echo '(on Debian postgresql-server-dev-NN), or set PG_CONFIG to another pg_config.' >&2
	@echo '"make test" and "make demo" install what they need themselves.' >&2
	@false
endif

## make                 build the extension
## make install         install it into the server of PG_CONFIG
## make demo            the demonstration, on a server of its own
## make test            all tests, on a server of their own; "test/run test NAME ..." some
## make fake-stripe     the fake Stripe by itself, until Ctrl-C; FAKE_STRIPE holds its options
## make torture         payments under random faults; SECONDS=600 SEED=1
## make bench           the measurements of doc/performance.md
## make leak            memory over 100,000 claims and 10,000 calls
## make coverage        the tests, and which lines they have run
## make fuzz            the parsers, fed with anything
## make lint            compilers' warnings, clang-tidy, cppcheck, pgindent
## make test-sanitize   the tests on a server with AddressSanitizer, UBSan and assertions
## make test-majors     the tests on each major, in chroots; MAJORS='17 18' TESTS=stripe (root, Debian)
## make deb             Debian's packages, built and tried in chroots; DEB_OPTIONS (root, Debian)
.PHONY: help
help:
	@sed -n 's/^## //p' $(firstword $(MAKEFILE_LIST))

# Those that set up a private server in a temporary directory; test/run has them all.
.PHONY: test test-sanitize coverage torture leak demo bench fuzz lint fake-stripe
test test-sanitize coverage leak demo bench fuzz lint:
	@test/run $@

torture:
	@test/run $@ $(or $(SECONDS),120) $(SEED)

fake-stripe:
	@test/run $@ $(FAKE_STRIPE)

.PHONY: test-majors deb
test-majors:
	@test/majors $(if $(MAJORS),-m '$(MAJORS)') $(if $(TESTS),-t '$(TESTS)') $(MAJORS_OPTIONS)

deb:
	@test/package $(DEB_OPTIONS)
