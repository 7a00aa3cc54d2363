// Package sockets holds host ports, so that no other process can bind them, and names who has
// one. It does not know where rows lead, nor what carries them.
package sockets
