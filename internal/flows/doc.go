// Package flows ends the flows that no row explains any more. It sees rows and the node's
// addresses; it does not know what carries the rows.
package flows
