#!/bin/sh
# Usage: test.sh [GO TEST FLAGS] PACKAGES
# go test, which prints what go test prints, but fails also if a test is skipped. With V=1 every line of go test -v is shown.
# To be run by in-namespace.sh.
set -eu

# The race detector needs cgo, a C compiler, libc's headers and a system that has it: try.
race=-race
if ! why=$(go build -race runtime/cgo 2>&1); then
	race=
	echo "without the race detector: $(echo "$why" | grep -v '^#' | head -n 1)"
fi

# Skips show under -v only. So each test's lines are held back until its verdict, and printed if that is not "passed".
# The last line hands go test's exit status to awk, as a pipe has no better way in POSIX sh.
{
	status=0
	go test $race -v -count=1 -timeout=5m "$@" 2>&1 || status=$?
	echo "exit status of go test: $status"
} | awk -v verbose="${V:-}" '
	function show(line) {
		if (verbose == "" && line !~ /^ *--- PASS: / && line != "PASS") print line
	}
	# What a test said, and before it the "=== " line that names the subtest.
	function release(name,    lines, n, i, heading) {
		n = split(held[name], lines, "\n")
		for (i = 1; i < n; i++) {
			if (lines[i] ~ /^=== /) { heading = lines[i]; continue }
			if (heading != "") show(heading)
			heading = ""
			show(lines[i])
		}
		held[name] = ""
	}

	/^exit status of go test: / { status = $NF; ended = 1; next }
	verbose != "" { print; fflush() }

	/--- SKIP: / { skipped++ }

	# A line of one test follows: "=== RUN   TestAdd/ipv4", also CONT, NAME, PAUSE.
	/^=== [A-Z]+ / {
		test = $3
		sub("/.*", "", test)
		open[test] = 1
		held[test] = held[test] $0 "\n"
		next
	}

	# The verdict on a test; those on its subtests follow, indented.
	/^--- (PASS|FAIL|SKIP|BENCH): / {
		if ($2 != "PASS:") release($3)
		delete open[$3]
		show($0)
		decided = $3
		test = ""
		next
	}
	test == "" && /^ +--- SKIP: / { release(decided) }

	# The end of a package. A test without a verdict by now has panicked or timed out.
	/^(ok|FAIL|\?)[ \t]/ {
		if ($1 == "FAIL") for (name in open) release(name)
		split("", open)
		split("", held)
		test = ""
		show($0)
		fflush()
		next
	}
	/^(PASS|FAIL)$/ { test = "" }

	test != "" { held[test] = held[test] $0 "\n"; next }
	{ show($0) }

	END {
		if (!ended) exit 1
		if (skipped) print "FAIL: skipped " skipped " of the tests, and here every test must run"
		exit (status == 0 && skipped) ? 1 : status
	}
'
