// Package memory is a node without a kernel, for tests of what embeds the library: it holds
// rows, knows who has which port, and has one manager at a time. It works on every system and
// takes no privileges. It does not know what the rows are for: no packet goes anywhere.
package memory
