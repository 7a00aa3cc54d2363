#!/bin/sh
# Vets everything with the oldest Go that go.mod lets in, and compiles a caller that stays on the modules of an old
# Kubernetes, as cri-dockerd does. The lowest versions of the dependencies are those of go.mod, which all else uses.
set -eu

cd "$(dirname "$0")/.."
root=$PWD
kubernetes=v0.29.15

GOTOOLCHAIN=go$(sed -n 's/^go //p' go.mod)
export GOTOOLCHAIN

hack/each-module.sh go vet -tags containerd ./...
echo "ok    $GOTOOLCHAIN"

dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
cd "$dir"

cat >go.mod <<EOF
module example.com/runtime

go ${GOTOOLCHAIN#go}

replace (
	github.com/cri-o/hostport => $root
	k8s.io/api => k8s.io/api $kubernetes
	k8s.io/apimachinery => k8s.io/apimachinery $kubernetes
)
EOF
# managedfields does not compile where something has raised the modules beside Kubernetes's own.
cat >main.go <<EOF
package main

import (
	"log"

	"k8s.io/apimachinery/pkg/util/managedfields"

	"github.com/cri-o/hostport"
)

func main() {
	m, err := hostport.New()
	log.Print(m.Mappings(), err, managedfields.GvkParser{})
}
EOF
go mod tidy 2>log || {
	cat log >&2
	exit 1
}
go vet .
go build -o /dev/null .
echo "ok    a caller with Kubernetes $kubernetes"
