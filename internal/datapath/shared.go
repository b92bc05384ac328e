// SPDX-License-Identifier: Apache-2.0

package datapath

import (
	"errors"
	"fmt"
	"net/netip"

	"github.com/cilium/ebpf"

	"github.com/lash-net/lash/bpf"
	"github.com/lash-net/lash/internal/model"
)

// counts is how many service ports want each of eight bits.
type counts [8]uint32

func (c *counts) change(bits uint8, by uint32) {
	for i := range c {
		if bits>>i&1 != 0 {
			c[i] += by
		}
	}
}

func (c *counts) bits() (out uint8) {
	for i, n := range c {
		if n > 0 {
			out |= 1 << i
		}
	}
	return out
}

// shared are rows that several service ports may want. Each has the bits that any of them wants; it is written when
// those change.
type shared[K comparable] struct {
	wanted map[K]*counts
	write  func(K, uint8) error // bits 0: remove it
}

// swap makes what a service port wanted before what it wants now. With force, all that it wants is written: an earlier
// write may have failed.
func (s *shared[K]) swap(before, now map[K]uint8, force bool) error {
	var errs []error
	for k, bits := range now {
		c := s.wanted[k]
		if c == nil {
			c = &counts{}
			s.wanted[k] = c
		}
		had := c.bits()
		c.change(bits, 1)
		c.change(before[k], ^uint32(0))
		if has := c.bits(); had != has || force {
			errs = append(errs, s.write(k, has))
		}
	}
	for k, bits := range before {
		if _, still := now[k]; still {
			continue
		}
		c := s.wanted[k]
		had := c.bits()
		c.change(bits, ^uint32(0))
		has := c.bits()
		if has == 0 {
			delete(s.wanted, k)
		}
		if had != has {
			errs = append(errs, s.write(k, has))
		}
	}
	return errors.Join(errs...)
}

// mend writes the rows that differ from what is wanted; have are those of the kernel.
func (s *shared[K]) mend(have map[K]uint8) error {
	var errs []error
	for k, c := range s.wanted {
		if have[k] != c.bits() {
			errs = append(errs, s.write(k, c.bits()))
		}
	}
	for k := range have {
		if s.wanted[k] == nil {
			errs = append(errs, s.write(k, 0))
		}
	}
	return errors.Join(errs...)
}

// portUse is what a service port makes of port numbers of this node.
func (d *Datapath) portUse(v model.ServicePort) map[uint16]uint8 {
	use := map[uint16]uint8{}
	for _, f := range v.Frontends {
		if f.Outside {
			use[f.Port] |= bpf.PortFrontend
		}
		if f.Addr.IsUnspecified() && !d.cfg.NoBindProtection {
			use[f.Port] |= bpf.PortNode
		}
	}
	for _, b := range v.Backends {
		if b.Host && b.Active() {
			use[b.Port] |= bpf.PortBackend
		}
	}
	return use
}

func (d *Datapath) writePort(port uint16, bits uint8) error {
	if err := d.maps["lash_ports"].Put(uint32(port), bits); err != nil {
		return fmt.Errorf("port %d: %w", port, err)
	}
	return nil
}

func (d *Datapath) listPorts() (map[uint16]uint8, error) {
	m := d.maps["lash_ports"]
	have := map[uint16]uint8{}
	err := listBatch(m, "lash_ports", func(port uint32, bits uint8) {
		if bits != 0 {
			have[uint16(port)] = bits
		}
	})
	return have, err
}

// addressUse is which addresses are services' by a service port, and whether for packets from outside. A node's address
// is not: what no service has of it is the node's.
func addressUse(v model.ServicePort) map[netip.Addr]uint8 {
	use := map[netip.Addr]uint8{}
	for _, f := range v.Frontends {
		if f.Node {
			continue
		}
		use[f.Addr] |= bpf.FrontendAddress
		if f.Outside {
			use[f.Addr] |= bpf.FrontendOutside
		}
	}
	return use
}

func (d *Datapath) writeAddress(a netip.Addr, bits uint8) error {
	key := bpf.ServiceKey{Addr: bpf.AddrFrom(a)}
	err := error(nil)
	if bits == 0 {
		err = remove(d.maps["lash_services"], key)
	} else {
		err = d.maps["lash_services"].Put(key, &bpf.Service{Flags: uint32(bits)})
	}
	if err != nil {
		return fmt.Errorf("address %s: %w", a, err)
	}
	return nil
}

// batchRows is how many rows one system call reads.
const batchRows = 4096

// listBatch reads a map that may have many rows.
func listBatch[K, V any](m *ebpf.Map, name string, each func(K, V)) error {
	keys, values := make([]K, batchRows), make([]V, batchRows)
	var cursor ebpf.MapBatchCursor
	for {
		n, err := m.BatchLookup(&cursor, keys, values, nil)
		if err != nil && !errors.Is(err, ebpf.ErrKeyNotExist) {
			return fmt.Errorf("read %s: %w", name, err)
		}
		for i := range n {
			each(keys[i], values[i])
		}
		if err != nil {
			return nil
		}
	}
}

// putAll writes rows of one map, many in one system call.
func putAll[K, V any](m *ebpf.Map, keys []K, values []V) error {
	if len(keys) < 2 {
		for i := range keys {
			if err := m.Put(keys[i], &values[i]); err != nil {
				return err
			}
		}
		return nil
	}
	_, err := m.BatchUpdate(keys, values, nil)
	return err
}
