#!/bin/sh
# Usage: test.sh [GO TEST FLAGS] PACKAGES
# go test, with the race detector where there is one; for ./... in the modules below as well. To be run by in-namespace.sh.
set -eu

# The race detector needs cgo, a C compiler, libc's headers and a system that has it: try.
race=-race
if ! why=$(go build -race runtime/cgo 2>&1); then
	race=
	echo "without the race detector: $(echo "$why" | grep -v '^#' | head -n 1)"
fi

for packages; do :; done
each=
[ "$packages" != ./... ] || each=hack/each-module.sh

# shellcheck disable=SC2086 # each nothing, or one word
exec $each go test $race -count=1 -timeout=20m "$@"
