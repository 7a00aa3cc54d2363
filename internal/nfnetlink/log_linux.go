package nfnetlink

import (
	"context"
	"encoding/binary"
	"errors"

	"github.com/mdlayher/netlink"
	"golang.org/x/sys/unix"
)

// What linux/netfilter/nfnetlink_log.h defines and x/sys/unix does not.
const (
	logPacket = 0 // NFULNL_MSG_PACKET
	logConfig = 1 // NFULNL_MSG_CONFIG

	logConfigCommand = 1 // NFULA_CFG_CMD
	logBind          = 1 // NFULNL_CFG_CMD_BIND
)

// BindLogGroup makes the connection the one that gets what is logged to an NFLOG group
// of the network namespace, until it is closed. The error is EBUSY if it is that one already,
// EPERM if another socket is or if CAP_NET_ADMIN is missing, and EINVAL if the kernel has no
// nfnetlink_log (nfnetlink_rcv_msg in net/netfilter/nfnetlink.c, which loads the module).
func (c *Conn) BindLogGroup(ctx context.Context, group uint16) error {
	m := nfMessage(unix.NFNL_SUBSYS_ULOG, logConfig, netlink.Acknowledge, unix.AF_UNSPEC, func(ae *netlink.AttributeEncoder) {
		ae.Uint8(logConfigCommand, logBind)
	})
	binary.BigEndian.PutUint16(m.Data[2:], group)

	_, err := c.Get(ctx, m)

	return err
}

// Permitted reports whether there is CAP_NET_ADMIN in the user namespace that owns the network
// namespace. The kernel asks for that before it looks at a message.
func (c *Conn) Permitted(ctx context.Context) bool {
	// Refused in any case: packets come from the kernel.
	_, err := c.Get(ctx, nfMessage(unix.NFNL_SUBSYS_ULOG, logPacket, netlink.Acknowledge, unix.AF_UNSPEC, nil))

	return !errors.Is(err, unix.EPERM)
}
