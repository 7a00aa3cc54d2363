#!/bin/sh
# Usage: each-module.sh COMMAND...
# Runs COMMAND in the folder of every module, also after one in which it failed.
set -u

cd "$(dirname "$0")/.." || exit 1

failed=0
for module in . examples/cni-portmap internal/interop internal/compare; do
	(cd "$module" && "$@") || {
		failed=1
		echo "FAIL  $module" >&2
	}
done
exit "$failed"
