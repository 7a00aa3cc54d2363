// Compare measures hostport beside other ways to map a host port, as their users run
// them: in one run, on one machine, in turns. It writes what it has seen into a folder,
// as a page and as plots.
//
// Each mapper works in a process of its own, in the node of a testbed of its own, so
// that rows, descriptors, CPU time and memory are those of one mapper. What asks them to
// work, and sends packets through their rules, is one process beside them.
//
//	make compare
package main
