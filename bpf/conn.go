// SPDX-License-Identifier: Apache-2.0

package bpf

import (
	"encoding/binary"
	"net/netip"
	"unsafe"
)

// ConnKeyOf is conn_key() of lib/conn.h: the normalised key of a packet's connection, and whether the packet's source is
// its hi side. Ports are those that the programs see: of an ICMP echo, the identifier on the requester's side.
func ConnKeyOf(src, dst netip.AddrPort, proto uint8) (k ConnKey, fromHi bool) {
	a, b := AddrFrom(src.Addr()), AddrFrom(dst.Addr())
	sport, dport := ToBE16(src.Port()), ToBE16(dst.Port())
	word := func(x Addr, i int) uint64 { return binary.NativeEndian.Uint64(x[8*i:]) }
	switch {
	case word(a, 1) != word(b, 1):
		fromHi = word(a, 1) > word(b, 1)
	case word(a, 0) != word(b, 0):
		fromHi = word(a, 0) > word(b, 0)
	default:
		fromHi = sport > dport
	}
	if fromHi {
		a, b, sport, dport = b, a, dport, sport
	}
	return ConnKey{Lo: a, Hi: b, LoPort: sport, HiPort: dport, Proto: proto}, fromHi
}

// ConnFrom is a row of lash_conn as the kernel hands it out, blank fields included. The slice must have its size.
func ConnFrom(raw []byte) Conn { return *(*Conn)(unsafe.Pointer(&raw[:unsafe.Sizeof(Conn{})][0])) }

// Node is where a direction with ActionTunnel leads: in C, a union with the MAC addresses.
func (d *ConnDir) Node() netip.Addr {
	return (*Addr)(unsafe.Pointer(&d.DMAC)).Addr()
}

// The address takes the place of both MAC addresses and of what follows them.
const _ = uint(unsafe.Offsetof(ConnDir{}.Packets) - unsafe.Offsetof(ConnDir{}.DMAC) - unsafe.Sizeof(Addr{}))
