#!/bin/sh
# Usage: get-kernel.sh DIR SERIES
# Puts Debian's newest cloud kernel of a series, such as 6.1 or 7, into DIR/SERIES, unless there is one: its release,
# vmlinuz, and as a part of an initramfs the modules that tests may need. The packages come from the Debian mirror that
# apt knows; nothing is installed, and what apt keeps for it is below DIR.
set -eu

suites='bullseye-security bookworm-security trixie trixie-backports'

root=$(realpath "$(dirname "$0")/..")
mkdir -p "$1"
dir=$(realpath "$1")
series=$2
[ ! -e "$dir/$series/release" ] || exit 0

die() {
	echo "$*" >&2
	exit 1
}

apt=$dir/apt
mkdir -p "$apt/lists/partial" "$apt/cache/archives/partial" "$apt/empty"
# shellcheck disable=SC2016 # apt expands it
mirror=$(apt-get indextargets --format '$(REPO_URI)' 'Origin: Debian' | grep -v -e -security | sort -u | head -n 1)
[ -n "$mirror" ] || die 'apt knows no Debian mirror to get kernels from'
for suite in $suites; do
	case $suite in *-security) uri=${mirror%/}-security ;; *) uri=$mirror ;; esac
	echo "deb [signed-by=/usr/share/keyrings/debian-archive-keyring.gpg] $uri $suite main"
done >"$apt/sources.list"
cat >"$apt/conf" <<-EOF
	Dir::Etc::sourcelist "$apt/sources.list";
	Dir::Etc::sourceparts "$apt/empty";
	Dir::Etc::preferencesparts "$apt/empty";
	Dir::State::lists "$apt/lists";
	Dir::Cache "$apt/cache";
	APT::Sandbox::User "root";
EOF
export APT_CONFIG="$apt/conf"

"$root/hack/quietly.sh" 'asking what kernels there are' apt-get update
image=$(apt-cache pkgnames "linux-image-$series." | grep -e '-cloud-amd64$' | sort -V | tail -n 1)
[ -n "$image" ] || die "no kernel $series in $suites"
release=${image#linux-image-}

# From Linux 6.19 on, Debian's kernels come in several packages.
packages=$image
for part in binary modules; do
	! apt-cache show "linux-$part-$release" >/dev/null 2>&1 || packages="$packages linux-$part-$release"
done

tmp=$(mktemp -d "$dir/tmp.XXXXXX")
trap 'rm -rf "$tmp"' EXIT
cd "$tmp"
# shellcheck disable=SC2086 # the packages are words
"$root/hack/quietly.sh" "getting $packages" apt-get download $packages
for deb in *.deb; do
	dpkg-deb -x "$deb" all
done

# Modules of the network, and what they may depend on: the rest would only fill the guest's memory.
from=$(find all -type d -path "*/modules/$release" | head -n 1)
to=usr/lib/modules/$release
mkdir -p "$to" new
(cd "$from" && find kernel/net kernel/lib kernel/crypto kernel/arch kernel/drivers/net/*.ko* -type f) |
	tar -C "$from" -cf - -T - | tar -C "$to" -xf -
find all -path "*/modules/$release/modules.*" -exec cp {} "$to" \;
find "$to" -name '*.ko.xz' -exec unxz {} +
busybox depmod -b "$PWD/usr" "$release"
find usr | busybox cpio -o -H newc >new/modules 2>/dev/null
find all -name 'vmlinuz*' -type f -exec cp {} new/vmlinuz \;
echo "$release" >new/release
rm -rf "${dir:?}/$series"
mv new "$dir/$series"
