# What came of the tests, from the log of test-kernels.sh: only those without subtests are counted.

function report(	name, parent, bad, part, backend, key) {
	for (name in result)
		for (parent = name; sub("/[^/]*$", "", parent);)
			parents[parent]
	for (name in result) {
		if (result[name] != "PASS:")
			bad = bad "\n    " result[name] " " name
		if (name in parents)
			continue
		backend = match("/" name "/", /\/(nftables|nft|legacy)\//) ? substr("/" name "/", RSTART + 1, RLENGTH - 2) : "other"
		count[backend, result[name] == "PASS:"]++
		backends[backend]
	}
	printf "  %s: exit code %s\n", package, code
	for (backend in backends)
		printf "    %-8s %5d passed %5d failed\n", backend, count[backend, 1], count[backend, 0]
	if (bad)
		print substr(bad, 2)
	if (code != 0 || bad)
		failed = 1
	delete result
	delete parents
	delete count
	delete backends
}

{ sub(/\r$/, "") }
/^@@ begin/ { package = $3; code = "none" }
/^ *--- (PASS|FAIL|SKIP): / { result[$3] = $2 }
/^@@ end/ { code = $3; report() }
/^@@ done/ { done = 1 }

END {
	if (code == "none")
		report()
	if (!done)
		print "  the machine did not come to the end"
	exit failed || !done
}
