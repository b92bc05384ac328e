// SPDX-License-Identifier: Apache-2.0

package bpf

import (
	"bytes"
	"embed"
	"encoding/binary"
	"fmt"
	"net/netip"
	"reflect"

	"github.com/cilium/ebpf"
)

//go:embed obj/*.o
var objects embed.FS

// Object returns one object as it was compiled: an ELF file.
func Object(object string) ([]byte, error) {
	raw, err := objects.ReadFile("obj/" + object + ".o")
	if err != nil {
		return nil, fmt.Errorf("object %s: %w", object, err)
	}
	return raw, nil
}

// Load returns the specification of one object: "pod", "netdev", "host" or "sock".
func Load(object string) (*ebpf.CollectionSpec, error) {
	raw, err := Object(object)
	if err != nil {
		return nil, err
	}
	spec, err := ebpf.LoadCollectionSpecFromReader(bytes.NewReader(raw))
	if err != nil {
		return nil, fmt.Errorf("object %s: %w", object, err)
	}
	return spec, nil
}

// Specialise writes the constants into the objects' read-only data. A constant that
// an object does not use is left out of it by the compiler; that is no error.
func Specialise(spec *ebpf.CollectionSpec, c *Constants) error {
	v := reflect.ValueOf(*c)
	for i := range v.NumField() {
		name := v.Type().Field(i).Tag.Get("cfg")
		variable, ok := spec.Variables[name]
		if !ok {
			continue
		}
		if err := variable.Set(v.Field(i).Interface()); err != nil {
			return fmt.Errorf("constant %s: %w", name, err)
		}
	}
	return nil
}

// BE16 and BE32 hold numbers in network byte order.
type (
	BE16 uint16
	BE32 uint32
)

// ToBE16 is htons.
func ToBE16(v uint16) BE16 {
	return BE16(binary.NativeEndian.Uint16(binary.BigEndian.AppendUint16(nil, v)))
}

// Host is ntohs.
func (v BE16) Host() uint16 { return uint16(ToBE16(uint16(v))) }

// AddrFrom is the map form of an address; the invalid address is all zero.
func AddrFrom(a netip.Addr) Addr {
	if !a.IsValid() {
		return Addr{}
	}
	return a.As16()
}

// Addr is the address again; all zero is the invalid address.
func (a Addr) Addr() netip.Addr {
	if a == (Addr{}) {
		return netip.Addr{}
	}
	return netip.AddrFrom16(a).Unmap()
}

// Net and mask of a prefix, in map form; a zero prefix gives zeros.
func (a *Addr) setMask(bits int) {
	for i := range a {
		switch {
		case bits >= 8:
			a[i] = 0xff
		case bits > 0:
			a[i] = byte(0xff << (8 - bits))
		}
		bits -= 8
	}
}

// PrefixFrom splits a prefix into network and mask; the invalid prefix gives zeros.
func PrefixFrom(p netip.Prefix) (net, mask Addr) {
	if !p.IsValid() {
		return
	}
	p = p.Masked()
	bits := p.Bits()
	if p.Addr().Is4() {
		bits += 96
	}
	mask.setMask(bits)
	return AddrFrom(p.Addr()), mask
}

// IPCacheKeyFrom is a prefix as key of the ipcache, whose lengths count all 128 bits.
func IPCacheKeyFrom(p netip.Prefix) IPCacheKey {
	p = p.Masked()
	bits := p.Bits()
	if p.Addr().Is4() {
		bits += 96
	}
	return IPCacheKey{Prefixlen: uint32(bits), Addr: AddrFrom(p.Addr())}
}

// Prefix is the key as a prefix again.
func (k IPCacheKey) Prefix() netip.Prefix {
	a, bits := k.Addr.Addr(), int(k.Prefixlen)
	if k.Addr == (Addr{}) {
		return netip.PrefixFrom(netip.IPv6Unspecified(), bits)
	}
	if a.Is4() && bits >= 96 {
		return netip.PrefixFrom(a, bits-96)
	}
	return netip.PrefixFrom(netip.AddrFrom16(k.Addr), bits)
}
