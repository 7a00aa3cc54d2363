#!/bin/sh
# Usage: lint.sh GOLANGCI-LINT
# Lints what Linux builds, and what other systems build in its place.
set -eu

cd "$(dirname "$0")/.."
. hack/cheap-build.sh

lint=$(realpath "$1")
failed=0
GOOS=linux hack/each-module.sh "$lint" run || failed=1
echo 'darwin:'
# What only Linux files use is not unused.
GOOS=darwin "$lint" run --disable unused,unparam || failed=1
exit "$failed"
