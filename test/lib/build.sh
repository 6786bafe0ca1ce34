# test/lib/build.sh: a temporary directory, and the extension built and installed in it.
#
# For test/run, which sets $command, $pg_config, $major and $bindir.
#
cleanup()
{
	[ -z "$keep" ] || return 0
	[ ! -s "$build/data/postmaster.pid" ] || as_user pg_ctl -D "$build/data" -m fast -s stop || true
	rm -rf "$work"
}

# A temporary directory that only root and the unprivileged user can enter,
# and whose name is short enough for a socket in it: sets work, build and user.
make_directory()
{
	base=${TMPDIR:-/tmp}
	[ ${#base} -le 40 ] && [[ $base != *[[:space:]]* ]] || base=/tmp
	work=$(mktemp -d "$base/idempotency-$command.XXXXXX")
	build=$work/build
	keep=
	trap cleanup EXIT
	trap 'exit 130' INT
	trap 'exit 143' TERM HUP

	if [ "$(id -u)" = 0 ]; then
		user=postgres
		id $user >/dev/null 2>&1 || die "there is no user $user to run the server as"
		chgrp "$(id -gn $user)" "$work"
		chmod 750 "$work"
	else
		user=$(id -un)
	fi
	mkdir "$build" "$work/tmp" "$work/home"
	[ "$(id -u)" != 0 ] || chown $user "$build" "$work/tmp" "$work/home"
}
keep=

# Run as the unprivileged user, in an environment that is the same everywhere.
as_user()
{
	local prefix=()

	[ "$(id -u)" != 0 ] || prefix=(runuser -u $user --)
	"${prefix[@]}" env -i PATH="$bindir:/usr/local/bin:/usr/bin:/bin:/usr/local/sbin:/usr/sbin:/sbin" \
		HOME="$work/home" USER="$user" LOGNAME="$user" SHELL=/bin/sh TMPDIR="$work/tmp" \
		LANG=C.UTF-8 LC_ALL=C.UTF-8 TZ=UTC CI="${CI:-}" PG_CONFIG="$pg_config" \
		${NODE_EXTRA_CA_CERTS:+NODE_EXTRA_CA_CERTS="$NODE_EXTRA_CA_CERTS"} \
		${IDEMPOTENCY_SANITIZE:+IDEMPOTENCY_SANITIZE="$IDEMPOTENCY_SANITIZE"} \
		"${sanitizer_options[@]}" "$@"
}
sanitizer_options=()

# The sources without what was built of them, as the unprivileged user's.
copy_sources()
{
	tar cf - --exclude=./.git --exclude=./_build --exclude='*.o' --exclude='*.so' --exclude='*.bc' \
		--exclude=./results --exclude=./output_iso --exclude=./tmp_check --exclude=./log . |
		(cd "$build" && as_user tar xf - --no-same-owner)
	cd "$build"
}

# Another server takes the place of the one that is installed.  What a sanitizer
# says goes to files, since tests expect some processes to die.
use_sanitizing_server()
{
	export ASAN_OPTIONS=detect_leaks=0
	pg_config=$(as_user test/sanitize/server "$major") || die "there is no server with sanitizers"
	bindir=$("$pg_config" --bindir)
	as_user mkdir sanitizer
	sanitizer_options=(
		ASAN_OPTIONS="abort_on_error=1:detect_leaks=0:detect_stack_use_after_return=0:verify_asan_link_order=0:log_path=$build/sanitizer/report"
		UBSAN_OPTIONS="halt_on_error=1:print_stacktrace=1:log_path=$build/sanitizer/report"
	)
	export PGISOLATIONTIMEOUT=300 PG_TEST_TIMEOUT_DEFAULT=600
	as_user test/sanitize/check "$build/planted" </dev/null || die "the server with sanitizers doesn't find what it should"
	version=$("$pg_config" --version)
	echo "Tests run with $version ($bindir)"
}

build_extension()
{
	as_user "${pgmake[@]}" -j"$(nproc)" "$@" all && as_user "${pgmake[@]}" "$@" install DESTDIR="$dest"
}

# Settings with which a server finds what is installed there.
settings()
{
	local dest=${1:-$dest}

	if [ "$major" -ge 18 ]; then
		echo "extension_control_path = '$dest$("$pg_config" --sharedir):\$system'"
	else
		echo "extension_destdir = '$dest'"
	fi
	echo "dynamic_library_path = '$dest$("$pg_config" --pkglibdir):\$libdir'"
}

# A second build, with the places at which tests hold or kill a process
# (src/base/debug_point.c), and a caller of Stripe that only tests have.
build_for_debugging()
{
	local dir=$build/_debug

	as_user mkdir "$dir" "$dir/test"
	as_user cp -R Makefile ./*.sql ./*.control src "$dir" && as_user cp -R test/caller "$dir/test" &&
		as_user find "$dir" -name '*.o' -delete || return
	debug_conf=$dir/server.conf
	settings "$dir/_dest" | as_user tee "$debug_conf" >/dev/null
	as_user "${pgmake[@]}" -C "$dir" -j"$(nproc)" COPT="$werror -DIDEMPOTENCY_DEBUG_POINTS" all &&
		as_user "${pgmake[@]}" -C "$dir" COPT="$werror -DIDEMPOTENCY_DEBUG_POINTS" install DESTDIR="$dir/_dest" &&
		as_user "${pgmake[@]}" -C "$dir/test/caller" COPT="$werror" install DESTDIR="$dir/_dest"
}

# A build for the major that OLD_PG_CONFIG names, for test/t/004_pg_upgrade.pl
build_old()
{
	local dir=$build/_old make=(make -s with_llvm=no "PG_CONFIG=$OLD_PG_CONFIG" COPT=-Werror)

	as_user mkdir "$dir" && as_user cp -R Makefile ./*.sql ./*.control src "$dir" &&
		as_user find "$dir" -name '*.o' -delete &&
		as_user "${make[@]}" -C "$dir" -j"$(nproc)" all &&
		as_user "${make[@]}" -C "$dir" install DESTDIR="$dir/_dest" || return
	old_conf=$dir/server.conf
	(
		pg_config=$OLD_PG_CONFIG
		major=$(server_major "$pg_config")
		settings "$dir/_dest"
		echo "fsync = off"
		echo "max_prepared_transactions = 10"
	) | as_user tee "$old_conf" >/dev/null
}
