# test/lib/suites.sh: pg_regress, isolation and TAP, run and counted.
#
# For test/run, after the build: run_suites [NAME ...] runs them all, or those named.
#
passed=0
failed=0
debug_conf=
old_conf=

# The last line, and the exit status.
finish()
{
	[ "$command" != test-sanitize ] || show_findings
	[ "$command" != coverage ] || show_coverage
	if [ $failed -gt 0 ] && [ "${CI:-}" != true ]; then
		keep=1
		echo "What the tests left is in $build"
	fi
	echo "$passed passed, $failed failed"
	[ $failed = 0 ] && [ $passed -gt 0 ]
	exit
}

# What the sanitizers, the assertions and palloc's own checks have found
show_findings()
{
	local file found

	found=$(
		for file in sanitizer/report.*; do
			[ ! -e "$file" ] || head -n 40 "$file"
		done
		grep -rhE 'TRAP: |(WARNING|ERROR): .*(detected write past chunk|problem in alloc set|bogus aset link|cache reference leak|buffer refcount leak|relcache reference leak|snapshot reference .* leak)' \
			--include='*.log' . 2>/dev/null | sort | uniq -c
	) || true
	if [ -n "$found" ]; then
		printf '%s\n' "$found"
		echo "FAILED: the sanitizers have found something"
		failed=$((failed + 1))
	else
		echo "sanitizers: nothing found"
	fi
}

show_coverage()
{
	as_user test/coverage coverage.txt . $([ -z "$debug_conf" ] || echo _debug) && cp coverage.txt "$top/coverage.txt" &&
		echo "$(wc -l <coverage.txt) lines were not run: see coverage.txt"
}

list()
{
	as_user "${pgmake[@]}" --eval="list: ; @echo \$($1)" list
}

# The tests of a list, or those of them that were named.
chosen()
{
	local name all
	all=$(list "$1")
	if [ ${#wanted[@]} = 0 ]; then
		echo "$all"
		return
	fi
	for name in $all; do
		[[ " ${wanted[*]} " != *" $name "* ]] || echo "$name"
	done
}

# Set regress, isolation and tap to the tests that are wanted.
choose_tests()
{
	wanted=("$@")
	regress=$(chosen REGRESS)
	if [ ${#wanted[@]} -gt 0 ] && [ -n "$regress" ]; then
		wanted+=(install cleanup)
		regress=$(chosen REGRESS)
	fi
	isolation=$(chosen ISOLATION)
	tap=$(ls test/t/*.pl 2>/dev/null || true)
	if [ ${#wanted[@]} -gt 0 ]; then
		tap=$(for name in "${wanted[@]}"; do ls "test/t/$name" "test/t/$name.pl" "$name" 2>/dev/null || true; done |
			grep '^test/t/' || true)
	fi
}

# TAP tests run side by side, as most of them wait most of their time; no more
# than the cores can carry, since what they wait for has its limits.
tap_jobs=$(nproc)
[ "$tap_jobs" -le 4 ] || tap_jobs=4

# Run one suite of installcheck.  Its output is in $1.out and $1.err.  TAP tests
# are named as they end, each with its time: all of them take minutes.
installcheck()
{
	local suite=$1
	shift
	as_user PGISOLATIONTIMEOUT="${PGISOLATIONTIMEOUT:-60}" IDEMPOTENCY_DEBUG_CONF="$debug_conf" \
		${old_conf:+OLD_PG_CONFIG="$OLD_PG_CONFIG" OLD_TEMP_CONFIG="$old_conf"} \
		PG_TEST_TIMEOUT_DEFAULT="${PG_TEST_TIMEOUT_DEFAULT:-180}" \
		"${pgmake[@]}" installcheck TEMP_CONFIG="$build/server.conf" \
		EXTRA_REGRESS_OPTS="--temp-instance=$build/_$suite --temp-config=$build/server.conf" \
		"$@" </dev/null 2>"$work/$suite.err" | tee "$work/$suite.out" |
		sed -nu 's/^\[[0-9:]*\] test\/t\/\([^ ]*\)\.pl \.* *\([a-z]*\) *\([0-9]* ms\)\{0,1\}.*/    \1 \2 \3/p'
}

# Count a suite: $1 suite, $2 its status, then its tests.  A test has passed if
# the suite says so; $pattern is what it says, with the test's name as NAME.
count()
{
	local suite=$1 status=$2 name re bad=() before=$passed
	shift 2

	for name in "$@"; do
		re=${name//./\\.}
		if grep -Eq "${pattern//NAME/$re}" "$work/$suite.out"; then
			passed=$((passed + 1))
		elif grep -E "$re \.+ skipped" "$work/$suite.out"; then
			continue
		else
			failed=$((failed + 1))
			bad+=("$name")
		fi
	done
	if [ ${#bad[@]} = 0 ] && [ "$status" != 0 ]; then
		failed=$((failed + 1))
		bad=("$suite itself")
	fi
	echo "$suite: $((passed - before)) of $# passed in $((SECONDS - suite_started)) s"
	suite_failed=("${bad[@]}")
	[ ${#bad[@]} = 0 ] || echo "FAILED: ${bad[*]}"
}

# What a failed suite of pg_regress left
show_regress()
{
	local suite=$1 diffs=$2

	if [ -s "$diffs" ]; then
		head -n 400 "$diffs"
	else
		tail -n 30 "$work/$suite.out" "$work/$suite.err"
		tail -n 30 "${diffs%/*}/log/initdb.log" "${diffs%/*}/log/postmaster.log" 2>/dev/null || true
	fi
	grep -hE 'PANIC:|TRAP:|terminated by signal' "${diffs%/*}/log/postmaster.log" 2>/dev/null || true
}

# how pg_regress and its isolation twin say that a test has passed
pattern='^(test| {4,}) +NAME +\.\.\. ok|^ok [0-9]+ +[-+] NAME( |$)'

run_regress()
{
	suite_started=$SECONDS status=0
	installcheck pg_regress REGRESS="$(echo $regress)" ISOLATION= TAP_TESTS= || status=$?
	count pg_regress $status $regress
	[ ${#suite_failed[@]} = 0 ] || show_regress pg_regress "$build/regression.diffs"
}

run_isolation()
{
	suite_started=$SECONDS status=0
	installcheck isolation REGRESS= ISOLATION="$(echo $isolation)" TAP_TESTS= || status=$?
	count isolation $status $isolation
	[ ${#suite_failed[@]} = 0 ] || show_regress isolation "$build/output_iso/regression.diffs"
}

# Some TAP tests want a build of their own.
build_for_tap()
{
	if [ -n "$tap" ] && grep -q 'debug => 1' $tap && ! build_for_debugging; then
		echo "The build for debugging failed"
		failed=1
		finish
	fi
	if [ -n "$tap" ] && [ -n "${OLD_PG_CONFIG:-}" ] && ! build_old; then
		echo "The build for the major to upgrade from failed"
		failed=1
		finish
	fi
}

run_tap()
{
	suite_started=$SECONDS status=0
	installcheck tap REGRESS= ISOLATION= PROVE_TESTS="$(echo $tap)" PROVE_FLAGS="--timer --jobs $tap_jobs" || status=$?
	pattern='^(\[[0-9:]+\] )?NAME \.+ ok'
	count tap $status $tap
	if [ ${#suite_failed[@]} -gt 0 ]; then
		tail -n 200 "$work/tap.err"
		sed -n '/^Test Summary Report/,$p' "$work/tap.out"
		for name in "${suite_failed[@]}"; do
			name=$(basename "$name" .pl)
			[ ! -e "tmp_check/log/regress_log_$name" ] || tail -n 60 "tmp_check/log/regress_log_$name"
		done
	fi
}

run_suites()
{
	choose_tests "$@"
	[ -z "$regress" ] || run_regress
	[ -z "$isolation" ] || run_isolation
	if [ -n "$tap" ]; then
		build_for_tap
		run_tap
	fi
	finish
}
