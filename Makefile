# idempotency: PostgreSQL extension that makes retries safe

EXTENSION = idempotency
DATA = idempotency--1.0.sql
PGFILEDESC = "idempotency - keys for requests received and calls sent"

MODULE_big = idempotency
OBJS = \
	$(WIN32RES) \
	src/arguments.o \
	src/fingerprint.o \
	src/idempotency.o \
	src/ledger.o \
	src/mac.o \
	src/namespace.o \
	src/open_claims.o \
	src/owner_spi.o \
	src/privileges.o \
	src/request_print.o \
	src/requests.o \
	src/result.o \
	src/stripe_key.o \
	src/stripe_keys.o \
	src/stripe_outcome.o

PG_CFLAGS = -Wall -Wextra -Wno-unused-parameter -Wno-sign-compare -Wno-missing-field-initializers

# our own symbols win over the server's, should a minor release export one of their names
PG_LDFLAGS = $(if $(filter Linux,$(shell uname -s)),-Wl$(comma)-Bsymbolic)
comma := ,

PG_CONFIG ?= pg_config
PGXS := $(shell $(PG_CONFIG) --pgxs)
include $(PGXS)
