# idempotency: PostgreSQL extension that makes retries safe

EXTENSION = idempotency
DATA = idempotency--1.0.sql
PGFILEDESC = "idempotency - keys for requests received and calls sent"

MODULE_big = idempotency
OBJS = \
	$(WIN32RES) \
	src/arguments.o \
	src/background.o \
	src/caller.o \
	src/databases.o \
	src/debug_point.o \
	src/drop_database.o \
	src/expiry.o \
	src/fingerprint.o \
	src/idempotency.o \
	src/json_member.o \
	src/json_text.o \
	src/launcher.o \
	src/ledger.o \
	src/ledger_search.o \
	src/left_orders.o \
	src/lock_limit.o \
	src/mac.o \
	src/namespace.o \
	src/notice.o \
	src/open_claims.o \
	src/owner_spi.o \
	src/privileges.o \
	src/recorder.o \
	src/recorder_queue.o \
	src/recorder_worker.o \
	src/request_print.o \
	src/requests.o \
	src/result.o \
	src/secret_file.o \
	src/settings_guard.o \
	src/settle.o \
	src/settle_event.o \
	src/shmem.o \
	src/stripe/api_key.o \
	src/stripe/exchange.o \
	src/stripe/form.o \
	src/stripe/gateway.o \
	src/stripe/path.o \
	src/stripe/reconcile.o \
	src/stripe/resource.o \
	src/stripe/stripe_call.o \
	src/stripe_answer.o \
	src/stripe_effect.o \
	src/stripe_expiry.o \
	src/stripe_key.o \
	src/stripe_keys.o \
	src/stripe_ledger.o \
	src/stripe_outcome.o \
	src/subtransaction.o \
	src/webhook_event.o \
	src/webhook_payload.o \
	src/webhook_queue.o \
	src/webhook_secret.o \
	src/webhook_signature.o \
	src/webhooks.o \
	src/worker.o

# the HTTP client, a library of its own: only it needs libcurl
STRIPE_LIBRARY = idempotency_stripe$(DLSUFFIX)
STRIPE_OBJS = src/stripe/http.o
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
$(OBJS) $(STRIPE_OBJS): $(wildcard src/*.h src/stripe/*.h)

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

# Set up a private server in a temporary directory, as test/run says.
.PHONY: test test-sanitize coverage torture leak demo bench fuzz lint fake-stripe
test test-sanitize coverage leak demo bench fuzz lint:
	@test/run $@

# payments under random faults; "make torture SECONDS=600 SEED=1"
torture:
	@test/run $@ $(or $(SECONDS),120) $(SEED)

# The tests on every major, each in a chroot that this makes (needs root, and
# Debian); "make test-majors MAJORS='17 18' TESTS=stripe", and test/majors has more.
.PHONY: test-majors
test-majors:
	@test/majors $(if $(MAJORS),-m '$(MAJORS)') $(if $(TESTS),-t '$(TESTS)') $(MAJORS_OPTIONS)

# Debian's packages, built and tried in chroots (needs root, and Debian)
.PHONY: deb
deb:
	@test/package $(DEB_OPTIONS)

# a fake Stripe to try things on, until Ctrl-C; FAKE_STRIPE holds its options
fake-stripe:
	@test/run $@ $(FAKE_STRIPE)
