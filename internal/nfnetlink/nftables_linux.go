package nfnetlink

import (
	"bytes"

	"github.com/mdlayher/netlink"
	"golang.org/x/sys/unix"
)

// What linux/netfilter/nf_tables.h defines and x/sys/unix does not.
const (
	nftaTableHandle   = 4
	nftaTableUserdata = 6  // Linux 5.10; ignored before
	nftaChainUserdata = 12 // the same
	nftaBitwiseOp     = 6
	nfDrop            = 0 // linux/netfilter.h
	nfAccept          = 1
	setElemCatchall   = 2 // NFT_SET_ELEM_CATCHALL
	tableOwner        = 2 // NFT_TABLE_F_OWNER, Linux 5.12
)

// Types of user data, from libnftnl's udata.h: a type, a length and a value
// each, numbers in the machine's byte order.
const (
	udataTableComment     = 0
	udataChainComment     = 0
	udataSetKeyByteOrder  = 0
	udataSetDataByteOrder = 1
	udataSetDataInterval  = 6
	udataSetComment       = 7
	udataElemComment      = 0
)

// Table makes messages about a table and what is in it.
type Table struct {
	// Family is unix.NFPROTO_IPV4 or unix.NFPROTO_IPV6.
	Family  uint8
	Name    string
	Comment string
	// Owned has the table made as one that only the connection that makes it can change, and that
	// goes when that is closed, however the process ends. Before Linux 5.12 this is EINVAL.
	Owned bool
}

// TableInfo is what the kernel tells of a table.
type TableInfo struct {
	// Handle is of this table alone: one made anew under the same name has
	// another.
	Handle uint64
	// Flags are those of enum nft_table_flags: a table may be dormant.
	Flags uint32
	// Use is how many chains, sets and other objects it has.
	Use uint32
}

// Chain is a chain; one without a type is reached from other chains alone.
type Chain struct {
	Name string
	// Type is "filter", "nat" or "route".
	Type     string
	Hook     uint32 // unix.NF_INET_*
	Priority int32
	// Comment is what a new chain gets; the kernel leaves that of an old one.
	Comment string
}

// ChainInfo is what the kernel tells of a chain, or a message that makes one.
type ChainInfo struct {
	Table, Name string
	// Type, Hook and Priority are as in Chain.
	Type     string
	Hook     uint32
	Priority int32
	// Handle is of this chain alone, as long as its table lives.
	Handle uint64
	// Policy is what becomes of packets that come to its end.
	Policy uint32
}

// SetInfo is what the kernel tells of a set or map, or a message that makes one.
type SetInfo struct {
	Name string
	// Flags are those of enum nft_set_flags.
	Flags uint32
	// KeyType and DataType are nft's numbers for what it consists of, the lengths in bytes.
	KeyType, KeyLen, DataType, DataLen uint32
	// Size is how many elements there may be; 0: any number.
	Size uint32
}

// Anonymous reports whether the set is part of a rule, and goes with that.
func (s SetInfo) Anonymous() bool { return s.Flags&unix.NFT_SET_ANONYMOUS != 0 }

// RuleInfo is what the kernel tells of a rule.
type RuleInfo struct {
	Chain string
	// Handle is of this rule alone, as long as its table lives.
	Handle uint64
	// Expressions are what it consists of, to the byte.
	Expressions string
}

// DataType is a type of set keys and data, by nft's number for it (datatype.h).
type DataType uint32

// The data types.
const (
	IPv4Addr    DataType = 7
	IPv6Addr    DataType = 8
	InetProto   DataType = 12
	InetService DataType = 13
	IfName      DataType = 41
)

// Size is how many bytes a value takes, a multiple of four.
func (t DataType) Size() uint32 {
	if t == IPv6Addr || t == IfName {
		return 16
	}

	return 4
}

// concat is several types as one: nft has six bits for each, and each begins
// on a register of its own.
func concat(types []DataType) (number, size uint32) {
	const typeBits = 6

	for _, t := range types {
		number, size = number<<typeBits|uint32(t), size+t.Size()
	}

	return number, size
}

// Set is a set, or a map if it has data.
type Set struct {
	Name      string
	Key, Data []DataType
	Comment   string
}

// Element is an element of a set or map. Key and Data are the values one after
// the other, each padded with zeros to four bytes.
type Element struct {
	Key, Data []byte
	Comment   string
}

// Create makes the table, unless it is there.
func (t Table) Create() netlink.Message {
	flags := uint32(0)
	if t.Owned {
		flags = tableOwner
	}

	return t.message(unix.NFT_MSG_NEWTABLE, netlink.Create, func(ae *netlink.AttributeEncoder) {
		ae.String(unix.NFTA_TABLE_NAME, t.Name)
		ae.Uint32(unix.NFTA_TABLE_FLAGS, flags)
		ae.Bytes(nftaTableUserdata, comment(udataTableComment, t.Comment))
	})
}

// Delete deletes the table with all that is in it.
func (t Table) Delete() netlink.Message {
	return t.message(unix.NFT_MSG_DELTABLE, 0, func(ae *netlink.AttributeEncoder) {
		ae.String(unix.NFTA_TABLE_NAME, t.Name)
	})
}

// Get asks for the table; ParseTable reads the answer.
func (t Table) Get() netlink.Message {
	return t.message(unix.NFT_MSG_GETTABLE, 0, func(ae *netlink.AttributeEncoder) {
		ae.String(unix.NFTA_TABLE_NAME, t.Name)
	})
}

// ParseTable reads the answer to Get.
func ParseTable(m netlink.Message) (TableInfo, error) {
	var info TableInfo

	err := decode(m.Data, func(ad *netlink.AttributeDecoder) {
		switch ad.Type() {
		case nftaTableHandle:
			info.Handle = ad.Uint64()
		case unix.NFTA_TABLE_FLAGS:
			info.Flags = ad.Uint32()
		case unix.NFTA_TABLE_USE:
			info.Use = ad.Uint32()
		}
	})

	return info, err
}

// CreateChain makes a chain, unless it is there. One of the same name that is
// of another type or elsewhere is EEXIST or EOPNOTSUPP.
func (t Table) CreateChain(c Chain) netlink.Message {
	return t.message(unix.NFT_MSG_NEWCHAIN, netlink.Create, func(ae *netlink.AttributeEncoder) {
		ae.String(unix.NFTA_CHAIN_TABLE, t.Name)
		ae.String(unix.NFTA_CHAIN_NAME, c.Name)

		if c.Comment != "" {
			ae.Bytes(nftaChainUserdata, comment(udataChainComment, c.Comment))
		}

		if c.Type == "" {
			return
		}

		ae.String(unix.NFTA_CHAIN_TYPE, c.Type)
		nested(ae, unix.NFTA_CHAIN_HOOK, func(ae *netlink.AttributeEncoder) {
			ae.Uint32(unix.NFTA_HOOK_HOOKNUM, c.Hook)
			ae.Int32(unix.NFTA_HOOK_PRIORITY, c.Priority)
		})
		ae.Uint32(unix.NFTA_CHAIN_POLICY, nfAccept)
	})
}

// GetChain asks for a chain; ParseChain reads the answer.
func (t Table) GetChain(name string) netlink.Message {
	return t.message(unix.NFT_MSG_GETCHAIN, 0, func(ae *netlink.AttributeEncoder) {
		ae.String(unix.NFTA_CHAIN_TABLE, t.Name)
		ae.String(unix.NFTA_CHAIN_NAME, name)
	})
}

// Chains asks for all chains of the table's family, other tables' too, with Dump.
func (t Table) Chains() netlink.Message { return t.message(unix.NFT_MSG_GETCHAIN, 0, nil) }

// ParseChain reads an answer to GetChain or Chains, or what CreateChain returns.
func ParseChain(m netlink.Message) (ChainInfo, error) {
	var info ChainInfo

	err := decode(m.Data, func(ad *netlink.AttributeDecoder) {
		switch ad.Type() {
		case unix.NFTA_CHAIN_TABLE:
			info.Table = ad.String()
		case unix.NFTA_CHAIN_NAME:
			info.Name = ad.String()
		case unix.NFTA_CHAIN_HANDLE:
			info.Handle = ad.Uint64()
		case unix.NFTA_CHAIN_POLICY:
			info.Policy = ad.Uint32()
		case unix.NFTA_CHAIN_TYPE:
			info.Type = ad.String()
		case unix.NFTA_CHAIN_HOOK:
			ad.Nested(func(ad *netlink.AttributeDecoder) error {
				for ad.Next() {
					switch ad.Type() {
					case unix.NFTA_HOOK_HOOKNUM:
						info.Hook = ad.Uint32()
					case unix.NFTA_HOOK_PRIORITY:
						info.Priority = ad.Int32()
					}
				}

				return nil
			})
		}
	})

	return info, err
}

// DeleteChain deletes a chain, which must be empty.
func (t Table) DeleteChain(name string) netlink.Message {
	return t.message(unix.NFT_MSG_DELCHAIN, 0, func(ae *netlink.AttributeEncoder) {
		ae.String(unix.NFTA_CHAIN_TABLE, t.Name)
		ae.String(unix.NFTA_CHAIN_NAME, name)
	})
}

// FlushChain deletes all rules of a chain.
func (t Table) FlushChain(name string) netlink.Message {
	return t.message(unix.NFT_MSG_DELRULE, 0, func(ae *netlink.AttributeEncoder) {
		ae.String(unix.NFTA_RULE_TABLE, t.Name)
		ae.String(unix.NFTA_RULE_CHAIN, name)
	})
}

// AppendRule adds a rule at the end of a chain. Its expressions are written as the kernel
// writes them (seen from Linux 5.10 to 7.3), so that ParseRule finds the same in both: all
// attributes, in the kernel's order, without NLA_F_NESTED, which nf_tables does not ask for.
func (t Table) AppendRule(chain string, exprs ...Expr) netlink.Message {
	return t.message(unix.NFT_MSG_NEWRULE, netlink.Create|netlink.Append, func(ae *netlink.AttributeEncoder) {
		ae.String(unix.NFTA_RULE_TABLE, t.Name)
		ae.String(unix.NFTA_RULE_CHAIN, chain)
		plain(ae, unix.NFTA_RULE_EXPRESSIONS, func(ae *netlink.AttributeEncoder) {
			for _, e := range exprs {
				plain(ae, unix.NFTA_LIST_ELEM, func(ae *netlink.AttributeEncoder) {
					ae.String(unix.NFTA_EXPR_NAME, e.name)
					plain(ae, unix.NFTA_EXPR_DATA, e.encode)
				})
			}
		})
	})
}

// Rules asks for all rules of the table, in their order, with Dump.
func (t Table) Rules() netlink.Message {
	return t.message(unix.NFT_MSG_GETRULE, 0, func(ae *netlink.AttributeEncoder) {
		ae.String(unix.NFTA_RULE_TABLE, t.Name)
	})
}

// ParseRule reads an answer to Rules, or what AppendRule returns.
func ParseRule(m netlink.Message) (RuleInfo, error) {
	var info RuleInfo

	err := decode(m.Data, func(ad *netlink.AttributeDecoder) {
		switch ad.Type() {
		case unix.NFTA_RULE_CHAIN:
			info.Chain = ad.String()
		case unix.NFTA_RULE_HANDLE:
			info.Handle = ad.Uint64()
		case unix.NFTA_RULE_EXPRESSIONS:
			info.Expressions = string(ad.Bytes())
		}
	})

	return info, err
}

// CreateSet makes a set or map, unless it is there. One of the same name and
// other types is EEXIST.
func (t Table) CreateSet(s Set) netlink.Message {
	return t.message(unix.NFT_MSG_NEWSET, netlink.Create, func(ae *netlink.AttributeEncoder) {
		keyType, keyLen := concat(s.Key)
		dataType, dataLen := concat(s.Data)

		ae.String(unix.NFTA_SET_TABLE, t.Name)
		ae.String(unix.NFTA_SET_NAME, s.Name)
		ae.Uint32(unix.NFTA_SET_ID, 1) // for references within the transaction, which go by name here
		ae.Uint32(unix.NFTA_SET_KEY_TYPE, keyType)
		ae.Uint32(unix.NFTA_SET_KEY_LEN, keyLen)

		// As nft writes them: concatenations have no byte order of their own.
		userdata := udata(udataSetKeyByteOrder, native(0))

		if dataLen > 0 {
			ae.Uint32(unix.NFTA_SET_FLAGS, unix.NFT_SET_MAP)
			ae.Uint32(unix.NFTA_SET_DATA_TYPE, dataType)
			ae.Uint32(unix.NFTA_SET_DATA_LEN, dataLen)

			userdata = append(userdata, udata(udataSetDataByteOrder, native(0))...)
			userdata = append(userdata, udata(udataSetDataInterval, native(0))...)
		}

		ae.Bytes(unix.NFTA_SET_USERDATA, append(userdata, comment(udataSetComment, s.Comment)...))
	})
}

// Sets asks for all sets and maps of the table, with Dump.
func (t Table) Sets() netlink.Message {
	return t.message(unix.NFT_MSG_GETSET, 0, func(ae *netlink.AttributeEncoder) {
		ae.String(unix.NFTA_SET_TABLE, t.Name)
	})
}

// ParseSet reads an answer to Sets, or what CreateSet returns.
func ParseSet(m netlink.Message) (SetInfo, error) {
	var info SetInfo

	numbers := map[uint16]*uint32{
		unix.NFTA_SET_FLAGS:    &info.Flags,
		unix.NFTA_SET_KEY_TYPE: &info.KeyType, unix.NFTA_SET_KEY_LEN: &info.KeyLen,
		unix.NFTA_SET_DATA_TYPE: &info.DataType, unix.NFTA_SET_DATA_LEN: &info.DataLen,
	}

	err := decode(m.Data, func(ad *netlink.AttributeDecoder) {
		switch number := numbers[ad.Type()]; {
		case number != nil:
			*number = ad.Uint32()
		case ad.Type() == unix.NFTA_SET_NAME:
			info.Name = ad.String()
		case ad.Type() == unix.NFTA_SET_DESC:
			ad.Nested(func(ad *netlink.AttributeDecoder) error {
				for ad.Next() {
					if ad.Type() == unix.NFTA_SET_DESC_SIZE {
						info.Size = ad.Uint32()
					}
				}

				return nil
			})
		}
	})

	return info, err
}

// DeleteSet deletes a set or map, which no rule may use.
func (t Table) DeleteSet(name string) netlink.Message {
	return t.message(unix.NFT_MSG_DELSET, 0, func(ae *netlink.AttributeEncoder) {
		ae.String(unix.NFTA_SET_TABLE, t.Name)
		ae.String(unix.NFTA_SET_NAME, name)
	})
}

// AddElement adds an element. If there is one with its key, that is EEXIST,
// whatever else is the same: else the old one's comment would silently stay.
func (t Table) AddElement(set string, e Element) netlink.Message {
	return t.element(unix.NFT_MSG_NEWSETELEM, netlink.Create|netlink.Excl, set, e)
}

// DeleteElement deletes the element with e's key, and without one that which
// stands for all others (nft's *, Linux 5.13).
func (t Table) DeleteElement(set string, e Element) netlink.Message {
	return t.element(unix.NFT_MSG_DELSETELEM, 0, set, Element{Key: e.Key})
}

// GetElement asks for the element with a key; ParseElements reads the answer.
func (t Table) GetElement(set string, key []byte) netlink.Message {
	return t.element(unix.NFT_MSG_GETSETELEM, 0, set, Element{Key: key})
}

func (t Table) element(kind uint16, flags netlink.HeaderFlags, set string, e Element) netlink.Message {
	return t.message(kind, flags, func(ae *netlink.AttributeEncoder) {
		ae.String(unix.NFTA_SET_ELEM_LIST_TABLE, t.Name)
		ae.String(unix.NFTA_SET_ELEM_LIST_SET, set)
		nested(ae, unix.NFTA_SET_ELEM_LIST_ELEMENTS, func(ae *netlink.AttributeEncoder) {
			nested(ae, unix.NFTA_LIST_ELEM, func(ae *netlink.AttributeEncoder) {
				if len(e.Key) > 0 {
					value(ae, unix.NFTA_SET_ELEM_KEY, e.Key)
				} else {
					ae.Uint32(unix.NFTA_SET_ELEM_FLAGS, setElemCatchall)
				}

				if len(e.Data) > 0 {
					value(ae, unix.NFTA_SET_ELEM_DATA, e.Data)
				}

				if e.Comment != "" {
					ae.Bytes(unix.NFTA_SET_ELEM_USERDATA, comment(udataElemComment, e.Comment))
				}
			})
		})
	})
}

// Elements asks for all elements of a set or map, with Dump.
func (t Table) Elements(set string) netlink.Message {
	return t.message(unix.NFT_MSG_GETSETELEM, 0, func(ae *netlink.AttributeEncoder) {
		ae.String(unix.NFTA_SET_ELEM_LIST_TABLE, t.Name)
		ae.String(unix.NFTA_SET_ELEM_LIST_SET, set)
	})
}

// ParseElements reads an answer to GetElement or Elements.
func ParseElements(m netlink.Message) ([]Element, error) {
	var list []Element

	err := decode(m.Data, func(ad *netlink.AttributeDecoder) {
		if ad.Type() != unix.NFTA_SET_ELEM_LIST_ELEMENTS {
			return
		}

		ad.Nested(func(ad *netlink.AttributeDecoder) error {
			for ad.Next() {
				ad.Nested(func(ad *netlink.AttributeDecoder) error {
					list = append(list, parseElement(ad))

					return nil
				})
			}

			return nil
		})
	})

	return list, err
}

func parseElement(ad *netlink.AttributeDecoder) Element {
	var e Element

	for ad.Next() {
		switch ad.Type() {
		case unix.NFTA_SET_ELEM_KEY:
			e.Key = parseValue(ad)
		case unix.NFTA_SET_ELEM_DATA:
			e.Data = parseValue(ad)
		case unix.NFTA_SET_ELEM_USERDATA:
			e.Comment = parseComment(ad.Bytes())
		}
	}

	return e
}

func parseValue(ad *netlink.AttributeDecoder) (value []byte) {
	ad.Nested(func(ad *netlink.AttributeDecoder) error {
		for ad.Next() {
			if ad.Type() == unix.NFTA_DATA_VALUE {
				value = bytes.Clone(ad.Bytes())
			}
		}

		return nil
	})

	return value
}
