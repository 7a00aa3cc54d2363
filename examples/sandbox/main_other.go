//go:build !linux

package main

import (
	"fmt"
	"os"
	"runtime"
)

func main() {
	fmt.Fprintf(os.Stderr, "sandbox: host ports are Linux's, and this is %s\n", runtime.GOOS)
	os.Exit(1)
}
