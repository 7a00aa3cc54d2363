// Package containerd puts the CNI plugin of examples/cni-portmap under a real containerd, and has it start and end pods
// with host ports through CRI, as the kubelet does. "make containerd" runs its test. It needs root, so it has a build tag:
// "make test" is for plain users as well.
package containerd
