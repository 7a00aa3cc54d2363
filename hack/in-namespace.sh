#!/bin/sh
# Usage: in-namespace.sh COMMAND...
# Runs COMMAND in network and mount namespaces of its own: what it does to interfaces, rules and sysctls ends with it
# and never reaches the host. A plain user gets a user namespace too, in which he is root. The loopback interface is down.
set -eu

PATH=$PATH:/usr/local/sbin:/usr/sbin:/sbin
export PATH

if [ "$(id -u)" -eq 0 ]; then
	kinds='--net --mount'
	hint='root without CAP_SYS_ADMIN? In a container, run it privileged'
else
	kinds='--user --map-root-user --net --mount'
	hint='run as root, or allow user namespaces (sysctl user.max_user_namespaces, kernel.unprivileged_userns_clone, kernel.apparmor_restrict_unprivileged_userns)'
fi

# iptables-legacy locks /run/xtables.lock, and the host's is not for us: an empty /run hides it.
empty_run='mount -t tmpfs tmpfs /run'

# shellcheck disable=SC2086 # the kinds are words
if ! why=$(unshare $kinds sh -c "$empty_run" 2>&1); then
	echo "cannot make namespaces: ${why:-unshare failed} ($hint)" >&2
	exit 1
fi

# There is no network inside: modules come now, and caches stay where they are.
if command -v go >/dev/null; then
	"$(dirname "$0")/each-module.sh" go mod download
	GOCACHE=$(go env GOCACHE)
	GOMODCACHE=$(go env GOMODCACHE)
	GOPROXY=off
	export GOCACHE GOMODCACHE GOPROXY
fi

# shellcheck disable=SC2086 # the kinds are words
exec unshare $kinds sh -c "$empty_run"' && exec "$@"' sh "$@"
