// Package row has the lines of the table of host ports: family, protocol, endpoint, owner, row,
// and the changes of rows. They are values, compared by meaning; the package does not know
// what carries them.
package row
