// Package outcome has what may come of an operation on the kernel: errors that say who is at
// fault, or how far it came, and the time for what has to follow. It does not know the operations.
package outcome
