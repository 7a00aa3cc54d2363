#!/bin/sh
# Vets everything with the newest Go and the newest version of every dependency, and runs the tests that these can break:
# those of the rooms, and real packets over every backend. All tests would take CI's time twice. go.mod stays as it is.
set -eu

cd "$(dirname "$0")/.."
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT

cp go.mod go.sum "$dir"
GOTOOLCHAIN=go$(go list -m -f '{{.Version}}' go@latest)
GOFLAGS="$(go env GOFLAGS) -modfile=$dir/go.mod"
export GOTOOLCHAIN GOFLAGS

hack/quietly.sh "$GOTOOLCHAIN, and the newest of:" sh -c 'go get -u -t ./... && go mod tidy'
go list -m -f '{{if not (or .Main .Indirect)}}{{.Path}} {{.Version}}{{end}}' all

go vet ./...
hack/in-namespace.sh sh -c '
	go test -count=1 ./internal/... &&
	go test -count=1 -run "^Test(Traffic|DualStack|Critest.*|Kubernetes.*|UDPFlows)$" .'
