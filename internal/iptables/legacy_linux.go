package iptables

import (
	"bytes"
	"errors"
	"fmt"
	"math/bits"
	"runtime"
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/cri-o/hostport/internal/outcome"
	"github.com/cri-o/hostport/internal/row"
)

// What linux/netfilter_ipv4/ip_tables.h defines, and IPv6 has as well.
const (
	legacyGetInfo    = 64 // IPT_SO_GET_INFO
	legacyGetEntries = 65 // IPT_SO_GET_ENTRIES
)

// legacyInfo is struct ipt_getinfo.
type legacyInfo struct {
	Name       [32]byte
	ValidHooks uint32
	HookEntry  [5]uint32
	Underflow  [5]uint32
	NumEntries uint32
	Size       uint32
}

// legacySocket is what the kernel is asked about its legacy tables with.
type legacySocket struct {
	family row.Family
	fd     int
}

func openLegacy(f row.Family) (legacySocket, error) {
	domain := unix.AF_INET
	if f == row.IPv6 {
		domain = unix.AF_INET6
	}

	fd, err := unix.Socket(domain, unix.SOCK_RAW|unix.SOCK_CLOEXEC, unix.IPPROTO_RAW)
	if err != nil {
		return legacySocket{}, fmt.Errorf("open raw socket: %w", err)
	}

	return legacySocket{f, fd}, nil
}

func (s legacySocket) close() { _ = unix.Close(s.fd) }

// get is getsockopt(2), for what x/sys has no function.
func (s legacySocket) get(option uintptr, value unsafe.Pointer, size uintptr) error {
	level := unix.SOL_IP
	if s.family == row.IPv6 {
		level = unix.SOL_IPV6
	}

	length := uint32(size) //nolint:gosec // is a table's

	_, _, errno := unix.Syscall6(unix.SYS_GETSOCKOPT, uintptr(s.fd), uintptr(level), option,
		uintptr(value), uintptr(unsafe.Pointer(&length)), 0) //nolint:gosec // as x/sys cannot
	if errno != 0 {
		return errno //nolint:wrapcheck // info and entries do
	}

	return nil
}

// info asks about a table. To ask makes the table.
func (s legacySocket) info(table string) (info legacyInfo, err error) {
	copy(info.Name[:], table)

	if err := s.get(legacyGetInfo, unsafe.Pointer(&info), unsafe.Sizeof(info)); err != nil { //nolint:gosec // likewise
		return legacyInfo{}, fmt.Errorf("look at table %s: %w", table, err)
	}

	return info, nil
}

// entries returns the entries of a table. To ask makes the table.
func (s legacySocket) entries(table string) ([]byte, error) {
	// Before the entries struct ipt_get_entries has the name, the size, and what aligns them.
	head := 40
	if runtime.GOARCH == "386" {
		head = 36
	}

	for try := 0; ; try++ {
		info, err := s.info(table)
		if err != nil {
			return nil, err
		}

		data := make([]byte, head+int(info.Size))
		copy(data, info.Name[:])
		*(*uint32)(unsafe.Pointer(&data[len(info.Name)])) = info.Size //nolint:gosec // is aligned

		switch err := s.get(legacyGetEntries, unsafe.Pointer(&data[0]), uintptr(len(data))); { //nolint:gosec // likewise
		case errors.Is(err, unix.EAGAIN) && try < outcome.MaxOvertaken: // it has another size now
		case err != nil:
			return nil, fmt.Errorf("list table %s: %w", table, err)
		default:
			return data[head:], nil
		}
	}
}

// legacyState returns how many rules the legacy tables have, and where the
// chains of the hooks begin and end, which takes the kernel no time.
func (t *Installed) legacyState() (tablesState, error) {
	s, err := openLegacy(t.Family)
	if err != nil {
		return tablesState{}, err
	}
	defer s.close()

	state := tablesState{}

	for _, table := range []string{NATTable, RawTable} {
		there, err := tableThere(t.Family, Legacy, table)
		if err != nil {
			return tablesState{}, err
		}

		if !there { // to ask would make it
			continue
		}

		info, err := s.info(table)
		if err != nil {
			return tablesState{}, err
		}

		// Each hook has a policy, and the table an end.
		state.entries += int(info.NumEntries) - bits.OnesCount32(info.ValidHooks) - 1
		state.hooks += fmt.Sprint(info)
	}

	return state, nil
}

// LegacyHasOurs reports whether a family's legacy nat table has chains of ours: with all any,
// else those that rows have. It starts no program, and makes no table.
func LegacyHasOurs(f row.Family, all bool) (bool, error) {
	there, err := tableThere(f, Legacy, NATTable)
	if err != nil || !there {
		return false, err
	}

	s, err := openLegacy(f)
	if err != nil {
		return false, err
	}
	defer s.close()

	entries, err := s.entries(NATTable)
	if err != nil {
		return false, err
	}

	// A chain begins with an entry whose target is "ERROR" (struct xt_error_target,
	// linux/netfilter/x_tables.h): 29 bytes for that name, one for a revision, and then the
	// name of the chain.
	const (
		target = "ERROR\x00"
		behind = 30 - len(target)
	)

	for {
		_, rest, found := bytes.Cut(entries, []byte(target))
		if !found || len(rest) < behind {
			return false, nil
		}

		entries = rest[behind:]

		if name, _, _ := bytes.Cut(entries, []byte{0}); isOurs(string(name), all) {
			return true, nil
		}
	}
}

// isOurs reports whether a chain is ours: with all any, else one that rows have.
func isOurs(chain string, all bool) bool {
	return IsOurs(chain) && (all || chain != DNATDispatch && chain != MasqDispatch)
}
