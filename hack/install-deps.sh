#!/bin/sh
# Usage: install-deps.sh NEED...
# Sees to it that each NEED is there: go, iptables (both variants), nft, tun, unshare, shellcheck, make; for other kernels
# also apt-get, busybox, qemu-system-x86_64, xz; for containerd: containerd, cni, which are the CNI project's plugins.
# Root gets what is missing from the distribution; a plain user gets one line that says what to install.
set -eu

cd "$(dirname "$0")/.."
PATH=$PATH:/usr/local/sbin:/usr/sbin:/sbin

die() {
	echo "$*" >&2
	exit 1
}

# The programs that a need stands for. tun is a device, which everybody may open where udev has made it
# (50-udev-default.rules); what to do with it takes CAP_NET_ADMIN.
programs() {
	case $1 in
	tun) [ -w /dev/net/tun ] || echo tun-that-may-be-opened ;;
	unshare) unshare --help 2>&1 | grep -q -e --kill-child || echo unshare-of-util-linux ;; # not that of busybox
	cni) [ -x /usr/lib/cni/bridge ] || [ -x /usr/libexec/cni/bridge ] || echo plugins-in-a-usual-folder ;;
	containerd) echo containerd ctr runc ;;
	iptables) echo iptables-nft-restore ip6tables-nft-restore iptables-legacy-restore ip6tables-legacy-restore ;;
	*) echo "$1" ;;
	esac
}

# The packages that hold them, by package manager.
packages() {
	case $manager:$1 in
	apt-get:iptables) echo iptables ;;
	dnf:iptables) echo iptables-nft iptables-legacy ;;
	apk:iptables) echo iptables iptables-legacy ;;
	apk:cni) echo cni-plugins ;;
	*:cni) echo containernetworking-plugins ;;
	apk:containerd) echo containerd containerd-ctr runc ;;
	*:containerd) echo containerd runc ;;
	apt-get:busybox) echo busybox-static ;;
	apt-get:qemu-system-x86_64) echo qemu-system-x86 ;;
	apt-get:xz) echo xz-utils ;;
	*:nft) echo nftables ;;
	*:unshare) echo util-linux ;;
	dnf:shellcheck) echo ShellCheck ;;
	*) echo "$1" ;;
	esac
}

# Of the needs given, those that are not met.
missing() {
	for need; do
		for program in $(programs "$need"); do
			command -v "$program" >/dev/null || {
				echo "$need"
				break
			}
		done
	done
}

lacking=$(missing "$@" | xargs)
case " $lacking " in
*' go '*) die "go is missing: install Go $(sed -n 's/^go //p' go.mod) or later, see https://go.dev/doc/install" ;;
'  ') exit 0 ;;
esac

case " $lacking " in
*' tun '*)
	[ "$(id -u)" -eq 0 ] || die "you may not open /dev/net/tun; as root, run: chmod 0666 /dev/net/tun"
	mkdir -p /dev/net
	mknod -m 0666 /dev/net/tun c 10 200 || die 'missing: /dev/net/tun; could not make it'
	lacking=$(missing "$@" | xargs)
	[ -n "$lacking" ] || exit 0
	;;
esac

manager=
for candidate in apt-get dnf apk; do
	if command -v "$candidate" >/dev/null; then
		manager=$candidate
		break
	fi
done

names=$(for need in $lacking; do packages "$need"; done | xargs)
case $manager in
apt-get) install="apt-get install -y $names" ;;
dnf) install="dnf install -y $names" ;;
apk) install="apk add $names" ;;
*) die "missing: $lacking; neither apt-get, dnf nor apk is here to install them" ;;
esac

[ "$(id -u)" -eq 0 ] || die "missing: $lacking; as root, run: $install"

export DEBIAN_FRONTEND=noninteractive
if [ "$manager" = apt-get ]; then
	# A mirror that does not answer is no reason to stop: the install says whether it matters.
	apt-get update -qq >/dev/null 2>&1 </dev/null || true
	install="apt-get install -y -qq --no-install-recommends -o DPkg::Lock::Timeout=120 $names"
fi
# shellcheck disable=SC2086 # the command is a list of words
hack/quietly.sh "installing $names" $install || die "missing: $lacking; could not install them"

lacking=$(missing "$@" | xargs)
[ -z "$lacking" ] || die "missing: $lacking, though $names is installed"
