//go:build !linux

package main

import (
	"fmt"
	"os"
)

func main() {
	fmt.Fprintln(os.Stderr, "host ports are mapped on Linux only")
	os.Exit(1)
}
