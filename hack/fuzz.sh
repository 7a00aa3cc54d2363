#!/bin/sh
# Usage: fuzz.sh FUZZTIME
# Runs every fuzz target of every package for FUZZTIME, and says in one line what came of each.
# To be run by in-namespace.sh.
set -eu

fuzztime=$1
found=0
failed=0
for package in $(go list ./...); do
	targets=$(go test -list '^Fuzz' "$package") || {
		echo "$targets"
		exit 1
	}
	for target in $(echo "$targets" | grep '^Fuzz' || true); do
		found=$((found + 1))
		if out=$(go test -run '^$' -fuzz "^$target\$" -fuzztime "$fuzztime" "$package" 2>&1); then
			echo "ok    $package $target: $(echo "$out" | sed -n 's/^fuzz: elapsed: [^,]*, \(execs.*\)/\1/p' | tail -n 1)"
		else
			failed=$((failed + 1))
			echo "FAIL  $package $target"
			echo "$out"
		fi
	done
done
[ "$found" -gt 0 ] || echo 'no fuzz targets'
[ "$failed" -eq 0 ]
