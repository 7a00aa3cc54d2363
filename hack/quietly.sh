#!/bin/sh
# Usage: quietly.sh TEXT COMMAND...
# Prints TEXT and runs COMMAND, whose output is shown only if it fails.
set -eu

echo "$1"
shift
log=$(mktemp)
trap 'rm -f "$log"' EXIT
"$@" >"$log" 2>&1 </dev/null || {
	status=$?
	cat "$log" >&2
	exit "$status"
}
