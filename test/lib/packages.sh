# test/lib/packages.sh: which packages a command needs, and their installation.
#
# For test/run, which sets $command.  choose_server sets pg_config, and major where
# that server has to be installed; install_missing asks apt-get for what is
# missing, after saying so.
#
oldest_major=15

# Does this pg_config belong to a server that we can build for and run?
is_complete()
{
	local pgxs
	pgxs=$("$1" --pgxs 2>/dev/null) && [ -f "$pgxs" ] &&
		[ -f "$("$1" --includedir-server)/postgres.h" ] &&
		[ -x "$("$1" --bindir)/postgres" ] &&
		[ -x "$(dirname "$pgxs")/../test/isolation/pg_isolation_regress" ]
}

# PostgreSQL's major version in the distribution, as far as apt knows it
distribution_major()
{
	{ apt-cache show --no-all-versions postgresql 2>/dev/null || true; } |
		sed -n 's/^Version: \([0-9][0-9]*\)[^0-9].*/\1/p' | head -n 1
}

# Set pg_config, and major if it has to be installed.
choose_server()
{
	local candidate

	major=
	if [ -n "${PG_CONFIG:-}" ]; then
		pg_config=$(command -v "$PG_CONFIG") || pg_config=$PG_CONFIG
		is_complete "$pg_config" && return
		if [[ $pg_config =~ ^/usr/lib/postgresql/([0-9]+)/bin/pg_config$ ]]; then
			major=${BASH_REMATCH[1]}
			return
		fi
		die "PG_CONFIG=$PG_CONFIG has no server to run, no headers or no PGXS"
	fi

	major=$(distribution_major)
	pg_config=/usr/lib/postgresql/$major/bin/pg_config
	is_complete "$pg_config" && return
	for candidate in $(ls -rv /usr/lib/postgresql/*/bin/pg_config 2>/dev/null) \
		$(command -v pg_config || true); do
		if is_complete "$candidate" && [ "$(server_major "$candidate")" -ge $oldest_major ]; then
			pg_config=$candidate
			return
		fi
	done
}

server_major()
{
	"$1" --version | sed 's/[^0-9]*\([0-9]*\).*/\1/'
}

# "=VERSION" of a package that is installed, if apt can still fetch that
# version's siblings: development files that fit the server leave it alone.
installed_version()
{
	local version

	version=$(dpkg-query -W -f='${Status} ${Version}' "$1" 2>/dev/null) || return 0
	[[ $version == "install ok installed "* ]] || return 0
	version=${version##* }
	! apt-cache madison "${1/postgresql-/postgresql-server-dev-}" 2>/dev/null |
		grep -qF " $version " || echo "=$version"
}

# Set packages to what is missing for this command, and dispensable to those
# of them without which it still shows something.
find_missing()
{
	packages=() dispensable=0
	case $command in
		test | test-sanitize | coverage | torture | leak | setup | fake-stripe)
			command -v python3 >/dev/null || packages+=(python3)
			command -v openssl >/dev/null || packages+=(openssl)
			;;
	esac
	[ "$command" != fake-stripe ] || return 0
	choose_server
	command -v make >/dev/null || packages+=(make)
	command -v gcc >/dev/null || packages+=(gcc)
	[ -e /usr/include/stdio.h ] || packages+=(libc6-dev)
	if ! is_complete "$pg_config"; then
		if [ -n "$major" ]; then
			[ -x "$(dirname "$pg_config")/postgres" ] || packages+=("postgresql-$major")
			packages+=("postgresql-server-dev-$major$(installed_version "postgresql-$major")")
		else
			packages+=(postgresql postgresql-server-dev-all)
		fi
	fi
	case $command in
		demo)
			dispensable=${#packages[@]}
			command -v curl-config >/dev/null || packages+=(libcurl4-openssl-dev)
			command -v python3 >/dev/null || packages+=(python3)
			dispensable=$((${#packages[@]} - dispensable))
			;;
		test | test-sanitize | coverage | leak | setup | bench | lint)
			command -v curl-config >/dev/null || packages+=(libcurl4-openssl-dev)
			;;
	esac
	case $command in
		test-sanitize)
			command -v dpkg-source >/dev/null || packages+=(dpkg-dev)
			command -v bison >/dev/null || packages+=(bison)
			command -v flex >/dev/null || packages+=(flex)
			[ -e /usr/include/openssl/ssl.h ] || packages+=(libssl-dev)
			[ -e /usr/include/zlib.h ] || packages+=(zlib1g-dev)
			;;
	esac
	case $command in
		test | test-sanitize | coverage | torture | leak | setup)
			command -v prove >/dev/null || packages+=(perl)
			perl -MIPC::Run -e 1 2>/dev/null || packages+=(libipc-run-perl)
			PATH=$PATH:/usr/sbin command -v pgbouncer >/dev/null || packages+=(pgbouncer)
			[ -n "$(find /usr/lib/python3 -path '*/psycopg/__init__.py' 2>/dev/null)" ] || packages+=(python3-psycopg)
			# not every release has it, and a test goes without
			[ -n "$(find /usr/lib/python3 -path '*/stripe/__init__.py' 2>/dev/null)" ] ||
				! apt-cache show --no-all-versions python3-stripe >/dev/null 2>&1 || packages+=(python3-stripe)
			;;
		bench)
			perl -MFile::Temp -e 1 2>/dev/null || packages+=(perl)
			command -v valgrind >/dev/null || packages+=(valgrind)
			;;
		lint)
			command -v clang >/dev/null || packages+=(clang)
			command -v clang-tidy >/dev/null || packages+=(clang-tidy)
			command -v cppcheck >/dev/null || packages+=(cppcheck)
			;;
		fuzz)
			perl -MJSON::PP -e 1 2>/dev/null || packages+=(perl)
			command -v clang >/dev/null || packages+=(clang)
			[ -n "$(find /usr/lib/llvm-*/lib/clang -name 'libclang_rt.fuzzer*' 2>/dev/null)" ] ||
				packages+=(libclang-rt-dev)
			;;
	esac
}

as_root()
{
	if [ "$(id -u)" = 0 ]; then
		"$@"
	elif [ "${CI:-}" = true ]; then
		sudo -n "$@"
	else
		sudo "$@"
	fi
}

# The script that runs as root.  PostgreSQL's packages create and start a
# cluster unless they are told not to; PgBouncer's start a service, so it is
# installed without the service's files.  A server that is running isn't
# upgraded, because that would restart its clusters; one that isn't is not
# started by its upgrade, either.
install_script='
set -e
export DEBIAN_FRONTEND=noninteractive LC_ALL=C
conf=/etc/postgresql-common/createcluster.d/zz-idempotency-test.conf
made=
for dir in /etc/postgresql-common /etc/postgresql-common/createcluster.d; do
	[ -d $dir ] || { mkdir -m 755 $dir; made="$dir $made"; }
done
policy=
trap "rm -f $conf \$policy; rmdir $made 2>/dev/null || true" EXIT
trap "exit 1" HUP INT TERM
echo "create_main_cluster = false" > $conf
case "$*" in
	*postgresql-[0-9]*)
		if [ -f /etc/postgresql-common/createcluster.conf ] &&
			! grep -q "^include_dir" /etc/postgresql-common/createcluster.conf; then
			echo "/etc/postgresql-common/createcluster.conf has no include_dir, so a cluster would be created: install the packages yourself."
			exit 1
		fi
		;;
esac
if apt-get install -s --no-install-recommends "$@" | grep "^Inst postgresql-[0-9]* \["; then
	if pg_lsclusters -h 2>/dev/null | grep -q " online"; then
		echo "This would upgrade a server that is running, and restart its clusters: upgrade it yourself first."
		exit 1
	fi
	if [ ! -e /usr/sbin/policy-rc.d ]; then
		policy=/usr/sbin/policy-rc.d
		printf "#!/bin/sh\nexit 101\n" > $policy
		chmod 755 $policy
	fi
fi
apt-get install -y --no-install-recommends -o DPkg::Lock::Timeout=120 \
	-o DPkg::Options::=--path-exclude=/etc/init.d/pgbouncer \
	-o DPkg::Options::=--path-exclude=/lib/systemd/system/pgbouncer.\* \
	-o DPkg::Options::=--path-exclude=/usr/lib/systemd/system/pgbouncer.\* \
	"$@" </dev/null
'

# What is missing can't be installed: the end, unless there is something to show.
do_without()
{
	[ ${#packages[@]} = $dispensable ] || die "$*"
	echo "test/run: $*" >&2
	echo "Going on without."
}

install_missing()
{
	local log

	find_missing
	[ ${#packages[@]} -gt 0 ] || return 0

	if ! command -v apt-get >/dev/null; then
		do_without "missing, and no apt-get to install it with (Debian's names): ${packages[*]}"
		return
	fi
	echo "Missing: ${packages[*]}"
	if ! as_root true 2>/dev/null; then
		do_without "neither root nor sudo to install them with"
		return
	fi

	log=$(mktemp "${TMPDIR:-/tmp}/idempotency-apt.XXXXXX")
	echo "apt-get update"
	as_root apt-get update </dev/null >"$log" 2>&1 || { tail "$log"; echo "Trying with the package lists there are."; }
	find_missing
	[ "$command" = fake-stripe ] || is_complete "$pg_config" || [ "${major:-0}" -ge $oldest_major ] ||
		die "the distribution's PostgreSQL is ${major:-unknown}, and $oldest_major is the oldest that works"
	echo "apt-get install --no-install-recommends ${packages[*]}"
	echo "(no cluster is created and no service started; a minute or two)"
	if ! as_root sh -c "$install_script" sh "${packages[@]}" >"$log" 2>&1; then
		tail -n 30 "$log"
		do_without "apt-get failed; its output is in $log"
		return
	fi
	sed -n 's/^Need to get \(.*\)\.$/Fetched \1./p' "$log"
	rm -f "$log"

	find_missing
	[ ${#packages[@]} = 0 ] || die "still missing after apt-get: ${packages[*]}"
}
