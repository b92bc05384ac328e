// SPDX-License-Identifier: Apache-2.0

package bpf

import (
	"encoding/binary"
	"net/netip"
	"testing"
)

func TestBothDirectionsHaveOneKey(t *testing.T) {
	for _, pair := range [][2]string{{"10.0.1.5:1", "10.0.2.7:80"}, {"10.0.1.5:80", "10.0.1.5:1"}, {"[fd00::1]:5", "[fd01::1]:5"}, {"[fd00::1]:5", "[fd00::2]:5"}} {
		a, b := netip.MustParseAddrPort(pair[0]), netip.MustParseAddrPort(pair[1])
		k, hi := ConnKeyOf(a, b, 6)
		back, backHi := ConnKeyOf(b, a, 6)
		if k != back || hi == backHi {
			t.Errorf("%s > %s: %v %v and %v %v", a, b, k, hi, back, backHi)
		}
		lo := netip.AddrPortFrom(k.Lo.Addr(), k.LoPort.Host())
		if (lo == a) == hi {
			t.Errorf("%s > %s: the lo side is %s, from the hi side: %v", a, b, lo, hi)
		}
	}
}

// The programs compare raw words: the addresses' last bytes count most on a little-endian machine.
func TestKeysAreOrderedAsTheProgramsDo(t *testing.T) {
	low, high := netip.MustParseAddr("10.0.1.200"), netip.MustParseAddr("10.0.2.1")
	if binary.NativeEndian.Uint16([]byte{1, 0}) == 1 {
		low, high = high, low
	}
	if k, _ := ConnKeyOf(netip.AddrPortFrom(low, 1), netip.AddrPortFrom(high, 2), 17); k.Lo.Addr() != low {
		t.Errorf("lo is %s", k.Lo.Addr())
	}
}

func TestTunnelsNodeIsReadFromTheUnion(t *testing.T) {
	for _, a := range []string{"172.18.0.12", "fd18::12"} {
		raw := make([]byte, binary.Size(Conn{}))
		want := AddrFrom(netip.MustParseAddr(a))
		copy(raw[64+24:], want[:]) // of the reply's direction
		c := ConnFrom(raw)
		if got := c.Reply.Node(); got != netip.MustParseAddr(a) {
			t.Errorf("got %s, want %s", got, a)
		}
	}
}
