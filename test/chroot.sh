#
# test/chroot.sh: chroots of Debian's releases, for test/majors and test/package.
#
# Sourced.  Needs root, debootstrap (which it installs) and Debian.  The mirror
# is this machine's own, read from apt's configuration.  Everything runs in a
# mount, process and IPC namespace of its own: nothing stays mounted, and no
# process survives, however the script ends.
#

die()
{
	echo "${0##*/}: $*" >&2
	exit 1
}

# The mirror in apt's configuration; of several the first
mirror()
{
	apt-get indextargets --format '$(ORIGIN) $(LABEL) $(REPO_URI)' 'Created-By: Packages' |
		sed -n 's/^Debian Debian //p' | head -n 1
}

# Set up for chroots in a directory, $1, which stays as a cache; only one script
# at a time may use it.  What is tested is what is in the current directory now.
open_cache()
{
	[ "$(id -u)" = 0 ] || die "chroots need root"
	command -v apt-get >/dev/null || die "this needs Debian's apt-get"
	if ! command -v debootstrap >/dev/null || [ -z "$(mirror)" ]; then
		echo "apt-get update"
		apt-get update </dev/null >/dev/null
	fi
	if ! command -v debootstrap >/dev/null; then
		echo "apt-get install debootstrap"
		DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends debootstrap </dev/null >/dev/null
	fi
	uri=$(mirror)
	[ -n "$uri" ] || die "apt's configuration names no mirror of Debian"

	mkdir -p "$1/log"
	cache=$(realpath "$1")
	exec 9>"$cache/lock"
	flock -n 9 || die "another run uses $cache"
	tar cf "$cache/source.tar" --exclude=./.git --exclude='*.o' --exclude='*.so' --exclude='*.bc' \
		--exclude=./results --exclude=./output_iso --exclude=./tmp_check --exclude=./log .
	trap 'rm -f "$cache/source.tar"' EXIT
}
anew= made=

# Run a shell script, the standard input, in a chroot: $1 its directory, $2
# the limit in seconds, then arguments.
inside()
{
	local root=$1 limit=$2 script
	shift 2

	script=$(cat)
	timeout --foreground -s KILL "$limit" \
		unshare --mount --pid --ipc --fork --kill-child --propagation private \
		env -i PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin \
		HOME=/root LANG=C.UTF-8 TERM=dumb DEBIAN_FRONTEND=noninteractive CI=true \
		${http_proxy:+http_proxy="$http_proxy"} ${https_proxy:+https_proxy="$https_proxy"} \
		chroot "$root" /bin/bash -c '
			mount -t proc proc /proc
			mount -t tmpfs -o size=1g tmpfs /dev/shm
			mount -t devpts -o newinstance,ptmxmode=0666 devpts /dev/pts 2>/dev/null || true
			eval "$0"' "set -euo pipefail
$script" "$@" </dev/null 9>&-
}

# Make a chroot of a release, $1, with a name, $2, unless it is there.
make_chroot()
{
	local release=$1 name=${2:-$1} root=$cache/${2:-$1}

	[ -z "$anew" ] || [[ " $made " == *" $name "* ]] || rm -rf --one-file-system "$root"
	made="$made $name"
	[ ! -d "$root" ] || return 0

	echo "Making $root"
	rm -rf --one-file-system "$root.new"
	timeout --foreground -s KILL 1800 unshare --mount --propagation private \
		debootstrap --variant=minbase --include=ca-certificates "$release" "$root.new" "$uri" \
		</dev/null >"$cache/log/$name.chroot" 2>&1 9>&- ||
		{ tail "$cache/log/$name.chroot"; return 1; }
	{
		# a mirror may lag behind releases that change every day
		echo 'Acquire::Check-Valid-Until "false";'
		echo 'APT::Install-Recommends "false";'
		apt-config dump | grep -E '^Acquire::(https?::|Check-Date)' || true
	} >"$root.new/etc/apt/apt.conf.d/99idempotency-test"
	if [ "$release" = sid ]; then
		for other in bookworm trixie experimental; do
			echo "deb $uri $other main"
		done >"$root.new/etc/apt/sources.list.d/others.list"
	fi
	cp /etc/hosts "$root.new/etc/hosts"
	inside "$root.new" 600 >>"$cache/log/$name.chroot" 2>&1 <<-'EOF' || { tail "$cache/log/$name.chroot"; return 1; }
		mkdir -p /etc/postgresql-common
		echo "create_main_cluster = false" >/etc/postgresql-common/createcluster.conf
		apt-get update
	EOF
	mv "$root.new" "$root"
}

# Unpack the source in a chroot's /src: $1 the chroot
unpack_source()
{
	rm -rf --one-file-system "$1/src"
	mkdir "$1/src"
	tar xf "$cache/source.tar" -C "$1/src" --no-same-owner
}
