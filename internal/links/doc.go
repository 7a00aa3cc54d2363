// Package links finds the interfaces that lead to pods, and whether pods there answer their
// neighbours past the node. It knows nothing of rules.
package links
