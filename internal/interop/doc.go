// Package interop proves that what hostport writes into nf_tables is what CRI-O
// reads there, and the other way round: on a node that changes from one to the
// other and back, either finds, serves and removes the rows that the other made.
//
// It has tests only. They look at the kernel with other eyes than hostport's
// own: nft(8), and sigs.k8s.io/knftables, through which CRI-O drives it. For
// knftables' sake this is a module of its own; hostport does not depend on it.
// CRI-O itself is played by a stand-in of a hundred lines, which makes the
// transactions that CRI-O's manager makes.
//
// Here are also the runtimes that could embed hostport (docs/porting.md): what
// stands between their code and its API, and their calls, with real packets. They
// need k8s.io/cri-api.
//
// Its folder containerd has a runtime that embeds nothing: a real one, with the CNI
// plugin of examples/cni-portmap.
//
// The tests need nft in PATH and namespaces of their own; in this folder:
//
//	go mod download
//	../../hack/in-namespace.sh go test -count=1 ./...
//
// testdata/nft-list-ip and testdata/nft-list-ip6 are what nft lists for a fixed
// set of rows. They are the format on the nodes out there: read every
// difference. "-update" behind the packages writes them anew.
package interop
