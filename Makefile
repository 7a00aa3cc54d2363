# The menu comes from the comments behind the targets; what takes more than a line is in hack/.

GOLANGCI_LINT_VERSION ?= v2.15.0
GOLANGCI_LINT := bin/golangci-lint

# For the command line: make test RUN=TestAdd PKG=. V=-v, make bench BENCH=Add COUNT=5, make fuzz FUZZTIME=2m,
# make chaos CHAOSTIME=1h BACKEND=nft SEED=7, make test-kernels KERNELS=5.10 RUN=TestAdd
PKG ?= ./...
RUN ?= .
V ?=
BENCH ?= .
BENCHTIME ?= 61x
COUNT ?= 1
FUZZTIME ?= 20s
CHAOSTIME ?= 10m
BACKEND ?= .*
KILLS ?= 300
QUICK ?=
DIR ?= docs/compare
SEED ?=
KERNELS ?= 5.10 6.1 6.12 7

# A plain user's PATH lacks the sbin folders, a fresh root's the place where Go's own archive goes.
export PATH := $(PATH):/usr/local/go/bin:/usr/local/sbin:/usr/sbin:/sbin

DEPS := hack/install-deps.sh
INSIDE := hack/in-namespace.sh

.NOTPARALLEL:
.PHONY: help demo test test-kernels lint fmt cross bench compare containerd fuzz chaos oldest newest verify tidy-check clean lint-tool

help:
	@echo "hostport: host ports for container runtimes. None of this touches the host's network, and only bench, containerd and verify need root."
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-12s %s\n", $$1, $$2 }' $(firstword $(MAKEFILE_LIST))

demo: ## a runtime in miniature: pods, host ports and connections, in a network namespace
	@$(DEPS) go unshare
	@go build -buildvcs=false -o bin/sandbox ./examples/sandbox
	@$(INSIDE) bin/sandbox

test: ## all tests, against the real kernel (RUN=, PKG=, V=-v)
	@$(DEPS) go iptables nft tun unshare
	@$(INSIDE) hack/test.sh $(V) -run '$(RUN)' $(PKG)

test-kernels: ## the tests on other kernels, emulated, for hours (KERNELS=, RUN=, PKG=, V=-v)
	@$(DEPS) go iptables nft apt-get busybox qemu-system-x86_64 xz
	@RUN='$(RUN)' V='$(V)' hack/test-kernels.sh '$(KERNELS)' $(PKG:./...=. ./internal/iptables ./internal/links ./internal/nfnetlink ./internal/nodeaddr ./internal/nodelock ./internal/probe ./internal/row ./internal/sockets ./internal/sysctl ./internal/testbed ./internal/trace)

lint: lint-tool ## golangci-lint for Linux and for the other systems' files, shellcheck for the scripts
	@$(DEPS) shellcheck
	@hack/lint.sh $(GOLANGCI_LINT)
	@shellcheck -x hack/*.sh .ci/run

fmt: lint-tool ## put the Go files into the form that lint asks for
	@$(GOLANGCI_LINT) fmt

cross: ## go vet and go build for every system and architecture that must compile
	@$(DEPS) go
	@hack/cross.sh

bench: ## benchmarks of the root package (BENCH=, BENCHTIME=, COUNT=)
	@$(DEPS) go iptables nft unshare
	@$(INSIDE) go test -run '^$$' -bench '$(BENCH)' -benchtime '$(BENCHTIME)' -count '$(COUNT)' -benchmem .

compare: ## hostport beside other ways to map ports, into docs/compare (QUICK=-quick DIR=/tmp)
	@$(DEPS) go iptables nft unshare
	@cd internal/compare && go build -buildvcs=false -o ../../bin/compare .
	@mkdir -p '$(DIR)'
	@$(INSIDE) bin/compare $(QUICK) -dir '$(DIR)' -portmap "$$(cd internal/compare && go tool -n portmap)"

containerd: ## pods with host ports under a real containerd, as root (V=-v)
	@[ "$$(id -u)" -eq 0 ] || { echo 'containerd takes root' >&2; exit 1; }
	@$(DEPS) go iptables nft unshare cni containerd
	@$(INSIDE) unshare --pid --fork --kill-child --mount-proc go -C internal/interop test -tags containerd -count=1 $(V) ./containerd

fuzz: ## every fuzz target, one after the other (FUZZTIME=)
	@$(DEPS) go unshare
	@$(INSIDE) hack/fuzz.sh '$(FUZZTIME)'

chaos: ## the fault suite for long, on nftables, nft and legacy (CHAOSTIME=, BACKEND=, KILLS=, SEED=)
	@$(DEPS) go iptables nft unshare
	@HOSTPORT_CHAOS='$(CHAOSTIME)' HOSTPORT_KILLS='$(KILLS)' HOSTPORT_CHAOS_SEED='$(SEED)' \
		$(INSIDE) hack/test.sh -timeout=0 -v -run '^Test(Chaos|Kills)$$/^$(BACKEND)$$' .

oldest: ## go vet with the oldest Go that can build it, and a caller on the modules of an old Kubernetes
	@$(DEPS) go
	@hack/oldest.sh

newest: ## go vet, and the tests that dependencies can break, with the newest Go and dependencies
	@$(DEPS) go iptables nft tun unshare
	@hack/newest.sh

verify: ## everything that CI runs
	@.ci/run

tidy-check: ## fail if a go.mod or go.sum is not what go mod tidy makes
	@$(DEPS) go
	@hack/each-module.sh go mod tidy -diff

clean: ## remove what was built
	@rm -rf bin coverage.out

lint-tool:
	@$(DEPS) go
	@test "$$($(GOLANGCI_LINT) version --short 2>/dev/null)" = '$(GOLANGCI_LINT_VERSION:v%=%)' || \
		hack/quietly.sh 'building golangci-lint $(GOLANGCI_LINT_VERSION), once; this takes some minutes' \
			env GOBIN='$(CURDIR)/bin' go install github.com/golangci/golangci-lint/v2/cmd/golangci-lint@$(GOLANGCI_LINT_VERSION)
