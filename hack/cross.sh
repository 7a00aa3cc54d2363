#!/bin/sh
# Vets (tests included) and builds every package for each system and each architecture that the module must compile for.
# linux/amd64 is what the tests run on. The modules under internal/ run nowhere else, and theirs take half of the time.
set -eu

cd "$(dirname "$0")/.."
. hack/cheap-build.sh

failed=0
for pair in linux/386 linux/arm linux/arm64 linux/s390x darwin/arm64 freebsd/amd64 windows/amd64; do
	export GOOS="${pair%/*}" GOARCH="${pair#*/}"
	if out=$(go vet ./... 2>&1 && go build -buildvcs=false -o /dev/null ./... 2>&1 && cd examples/cni-portmap && go vet ./... 2>&1); then
		echo "ok    $pair"
	else
		failed=1
		echo "FAIL  $pair"
		echo "$out"
	fi
done
exit "$failed"
