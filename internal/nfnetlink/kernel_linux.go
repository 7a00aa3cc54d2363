package nfnetlink

import (
	"fmt"
	"slices"

	"golang.org/x/sys/unix"
)

// KernelAtLeast reports whether the kernel is of a version or later. What the kernel
// can be asked is asked instead: distributions take features back to older versions.
func KernelAtLeast(major, minor int) bool {
	var (
		name      unix.Utsname
		have, sub int
	)

	if unix.Uname(&name) != nil {
		return false
	}

	_, err := fmt.Sscanf(unix.ByteSliceToString(name.Release[:]), "%d.%d", &have, &sub)

	return err == nil && slices.Compare([]int{have, sub}, []int{major, minor}) >= 0
}
