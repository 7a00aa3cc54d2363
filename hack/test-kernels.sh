#!/bin/sh
# Usage: RUN=REGEXP V=[-v] test-kernels.sh 'SERIES...' PACKAGE...
# Runs the tests of packages on other kernels, emulated: for each a machine without disk or network is booted, whose
# memory holds the kernel's modules, busybox, this system's nft and iptables, and the tests. Prints for each package and
# backend how many tests passed and failed, and which failed; what else they print is in bin/kernels/SERIES.log.
set -eu

cd "$(dirname "$0")/.."
dir=bin/kernels
all=$1
shift

test_limit=14400 # seconds
# Some boots in a hundred hang or die in the emulator before the tests begin; no others are tried again.
boot_limit=120 # seconds
tries=3

tmp=$(mktemp -d)
qemu=
trap '[ -z "$qemu" ] || kill "$qemu" 2>/dev/null || true; rm -rf "$tmp"' EXIT
trap 'exit 1' INT TERM

# What all machines have: the tests, each in its folder, and the programs they call with their libraries.
root=$tmp/root
for d in bin sbin lib lib64; do
	mkdir -p "$root/usr/$d"
	ln -s "usr/$d" "$root/$d"
done
for d in dev etc proc run sys tests tmp; do
	mkdir "$root/$d"
done
cp "$(command -v busybox)" "$root/usr/bin/busybox"
for d in /usr/lib/*/xtables; do
	mkdir -p "$root$d"
	cp "$d"/*.so "$root$d"
done
for program in nft xtables-nft-multi xtables-legacy-multi; do
	cp "$(command -v $program)" "$root/usr/sbin"
done
for variant in nft legacy; do
	for name in iptables ip6tables; do
		for suffix in '' -save -restore; do
			ln -s "xtables-$variant-multi" "$root/usr/sbin/$name-$variant$suffix"
			ln -sf "xtables-nft-multi" "$root/usr/sbin/$name$suffix"
		done
	done
done
ldd "$root"/usr/sbin/nft "$root"/usr/sbin/xtables-*-multi "$root"/usr/lib/*/xtables/*.so | grep -o '/[^ :)]*\.so[^ :)]*' |
	grep -v "^$root" | sort -u | while read -r library; do
	mkdir -p "$root$(dirname "$library")"
	cp "$library" "$root$library"
done
cp /etc/protocols "$root/etc"
for package; do
	folder=$root/tests/$(go list -f '{{.Name}}' "$package")
	mkdir "$folder"
	CGO_ENABLED=0 go test -c -o "$folder/test" "$package"
	[ ! -d "$package/testdata" ] || cp -r "$package/testdata" "$folder"
done
printf %s "${RUN:-.}" >"$root/tests/run"
cat >"$root/init" <<'EOF'
#!/bin/busybox sh
export PATH=/usr/sbin:/usr/bin HOME=/root
/bin/busybox --install -s /usr/bin
ln -sf ../bin/busybox /usr/sbin/modprobe
mount -t proc proc /proc
mount -t sysfs sys /sys
mount -t devtmpfs dev /dev
mount -t tmpfs -o mode=1777 tmp /tmp
exec </dev/null >/dev/ttyS0 2>&1
stty -F /dev/ttyS0 -onlcr
ulimit -n 65536
modprobe br_netfilter
modprobe tun
for folder in /tests/*/; do
	cd "$folder"
	echo "@@ begin ${folder%/}"
	./test -test.v -test.timeout=0 -test.run "$(cat /tests/run)"
	echo "@@ end $?"
done
echo "@@ done"
reboot -f
EOF
chmod 755 "$root/init"
(cd "$root" && find . | busybox cpio -o -H newc) >"$tmp/base" 2>/dev/null

# run boots a machine and waits until it has ended; what it says is in $log. It fails if the tests did not begin.
run() {
	# With a thread for each CPU one may run code that another has just patched: the kernel dies of int3.
	timeout "$test_limit" qemu-system-x86_64 -M pc -accel tcg,thread=single -cpu max,la57=off,cx16=off -m 2048 -smp 2 \
		-nodefaults -no-user-config -display none -no-reboot -serial "file:$log" \
		-kernel "$dir/$series/vmlinuz" -initrd "$tmp/initrd" \
		-append 'console=ttyS0 rdinit=/init quiet loglevel=1 panic=-1 mitigations=off random.trust_cpu=on nowatchdog' </dev/null &
	qemu=$!
	for _ in $(seq "$boot_limit"); do
		! grep -q '^@@ begin' "$log" 2>/dev/null || break
		sleep 1
	done
	if ! grep -q '^@@ begin' "$log"; then
		kill "$qemu" 2>/dev/null || true
		wait "$qemu" || true
		return 1
	fi
	[ -z "${V:-}" ] || tail -n +1 -f --pid="$qemu" "$log"
	wait "$qemu" || true
}

failed=0
for series in $all; do
	hack/get-kernel.sh "$dir" "$series"
	cat "$tmp/base" "$dir/$series/modules" >"$tmp/initrd"
	log=$dir/$series.log
	for try in $(seq $tries); do
		: >"$log"
		! run || break
		echo "Linux $(cat "$dir/$series/release"): did not begin, $try of $tries tries"
	done
	echo "Linux $(cat "$dir/$series/release"):"
	awk -f hack/test-kernels.awk "$log" || failed=1
done
exit $failed
