// SPDX-License-Identifier: Apache-2.0

package datapath

import (
	"errors"
	"fmt"
	"net/netip"
	"slices"

	"github.com/cilium/ebpf"
	"golang.org/x/sys/unix"

	"github.com/lash-net/lash/bpf"
)

// Prefilter lists the prefixes whose packets devices drop by their source, sorted. They are kept in the kernel only, and
// outlive the agent.
func (d *Datapath) Prefilter() ([]netip.Prefix, error) {
	if d.xdp != nil {
		return nil, nil
	}
	var out []netip.Prefix
	err := list(d.maps["lash_prefilter"], "lash_prefilter", func(k bpf.IPCacheKey, _ uint32) { out = append(out, k.Prefix()) })
	slices.SortFunc(out, netip.Prefix.Compare)
	return out, err
}

// ChangePrefilter adds and removes prefixes. Adding one that is there is no error, removing one that is not is.
func (d *Datapath) ChangePrefilter(add, remove []netip.Prefix) error {
	if !d.cfg.XDP && len(add) > 0 {
		return errors.New("the prefilter is XDP's, which is off: set bpf-lb-acceleration to best-effort or native (loadBalancer.acceleration)")
	}
	if d.xdp != nil {
		return fmt.Errorf("the prefilter is XDP's, and this kernel does not take the program: %w", d.xdp)
	}
	m := d.maps["lash_prefilter"]
	var errs []error
	for _, p := range add {
		err := m.Put(bpf.IPCacheKeyFrom(p), uint32(1))
		if errors.Is(err, unix.ENOSPC) {
			err = fmt.Errorf("there is room for %d prefixes, which are there", m.MaxEntries())
		}
		if err != nil {
			errs = append(errs, fmt.Errorf("add %s: %w", p, err))
		}
	}
	for _, p := range remove {
		err := m.Delete(bpf.IPCacheKeyFrom(p))
		if errors.Is(err, ebpf.ErrKeyNotExist) {
			err = errors.New("it is not in the prefilter; 'lash prefilter list' shows what is")
		}
		if err != nil {
			errs = append(errs, fmt.Errorf("delete %s: %w", p, err))
		}
	}
	return errors.Join(errs...)
}
