#!/bin/sh
# Usage: lint.sh GOLANGCI-LINT
# Lints what Linux builds, and what other systems build in its place.
set -eu

cd "$(dirname "$0")/.."
. hack/cheap-build.sh

failed=0
echo 'linux:'
GOOS=linux "$1" run || failed=1
echo 'darwin:'
# What only Linux files use is not unused.
GOOS=darwin "$1" run --disable unused,unparam || failed=1
exit "$failed"
