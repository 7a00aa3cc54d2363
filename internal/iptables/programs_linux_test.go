package iptables

import (
	"os/exec"
	"syscall"
	"testing"

	"github.com/stretchr/testify/assert"
)

// What iptables-nft says of a transaction that its socket does not take: with glibc, and with musl.
func TestMessageTooLong(t *testing.T) {
	t.Parallel()

	for _, words := range []string{"sendmsg() failed: Message too long", "sendmsg() failed: Message too large"} {
		assert.ErrorIs(t, &commandError{name: "iptables-restore", err: &exec.ExitError{}, stderr: words}, syscall.EMSGSIZE)
	}

	assert.NotErrorIs(t, &commandError{name: "iptables-restore", err: &exec.ExitError{}, stderr: "line 3 failed"}, syscall.EMSGSIZE)
}
