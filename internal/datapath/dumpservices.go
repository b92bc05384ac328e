// SPDX-License-Identifier: Apache-2.0

package datapath

import (
	"fmt"
	"net/netip"
	"sort"
	"strings"

	"github.com/lash-net/lash/bpf"
	"github.com/lash-net/lash/internal/model"
)

// dumpServices reads the maps of services as tables of text: all frontends with their slots ("lb"), the backends, the
// Maglev tables in short, what clients remember of their backend, or the sources that are let in or kept out.
func (d *Datapath) dumpServices(kind string) (columns []string, rows [][]string, err error) {
	add := func(cells ...any) {
		row := make([]string, len(cells))
		for i, c := range cells {
			row[i] = fmt.Sprint(c)
		}
		rows = append(rows, row)
	}
	at := func(a bpf.Addr, port bpf.BE16) netip.AddrPort { return netip.AddrPortFrom(keyAddr(a), port.Host()) }
	switch kind {
	case "lb":
		columns = []string{"SERVICE ADDRESS", "BACKEND ADDRESS (SERVICE_ID) (SLOT)"}
		slots := map[bpf.BackendKey]bpf.Backend{}
		if err = listBatch(d.maps["lash_backends"], "lash_backends", func(k bpf.BackendKey, v bpf.Backend) { slots[k] = v }); err != nil {
			return nil, nil, err
		}
		led := map[bpf.BackendKey]bool{}
		err = listBatch(d.maps["lash_services"], "lash_services", func(k bpf.ServiceKey, v bpf.Service) {
			front := fmt.Sprintf("%s/%s", at(k.Addr, k.Port), protoOrAny(k.Proto))
			add(front+" (0)", fmt.Sprintf("%s (%d) (0) [%s]", netip.AddrPortFrom(unspecifiedLike(k.Addr), 0), v.ID, strings.Join(serviceFlags(v), ", ")))
			for slot := uint32(1); slot < v.First+v.Count || slot <= v.Local; slot++ {
				key := bpf.BackendKey{Service: v.ID, Slot: slot}
				b := slots[key]
				led[key] = true
				add(fmt.Sprintf("%s (%d)", front, slot), fmt.Sprintf("%s/%s (%d) (%d)%s", at(b.Addr, b.Port), model.ProtoName(b.Proto), v.ID, slot, slotRange(v, slot)))
			}
		})
		for k, b := range slots {
			if !led[k] {
				add(fmt.Sprintf("(no service) (%d)", k.Slot), fmt.Sprintf("%s/%s (%d) (%d)", at(b.Addr, b.Port), model.ProtoName(b.Proto), k.Service, k.Slot))
			}
		}
	case "lb-backends":
		columns = []string{"SERVICE_ID", "SLOT", "BACKEND ADDRESS", "STATE"}
		active := map[bpf.MemberKey]bool{}
		if err = listBatch(d.maps["lash_backends"], "lash_backends", func(k bpf.BackendKey, v bpf.Backend) {
			active[bpf.MemberKey{Service: k.Service, Addr: v.Addr, Port: v.Port}] = true
			add(k.Service, k.Slot, fmt.Sprintf("%s/%s", at(v.Addr, v.Port), model.ProtoName(v.Proto)), "active")
		}); err != nil {
			return nil, nil, err
		}
		err = listBatch(d.maps["lash_members"], "lash_members", func(k bpf.MemberKey, _ uint32) {
			if !active[k] {
				add(k.Service, "-", at(k.Addr, k.Port), "existing connections only")
			}
		})
	case "lb-maglev":
		columns = []string{"SERVICE_ID", "ENTRIES", "SLOT", "ENTRIES OF SLOT"}
		var ids []uint32
		if err = list(d.maps["lash_maglev"], "lash_maglev", func(id uint32, _ uint32) { ids = append(ids, id) }); err != nil {
			return nil, nil, err
		}
		for _, id := range ids {
			inner, err := d.tableOf(id)
			if err != nil || inner == nil {
				continue
			}
			share := map[uint32]int{}
			size := inner.MaxEntries() - 1
			err = listBatch(inner, "lash_maglev", func(i, slot uint32) {
				if i < size {
					share[slot]++
				}
			})
			inner.Close()
			if err != nil {
				return nil, nil, err
			}
			for slot, n := range share {
				add(id, size, slot, n)
			}
		}
	case "lb-affinity":
		columns = []string{"SERVICE_ID", "CLIENT", "BACKEND ADDRESS"}
		err = listBatch(d.maps["lash_affinity"], "lash_affinity", func(k bpf.AffinityKey, v bpf.Affinity) {
			client := keyAddr(k.Client).String()
			if k.Client[15] == 0 && [7]byte(k.Client[8:15]) == [7]byte{} { // a namespace's cookie is in the first half
				client = fmt.Sprintf("netns %d", cookie(k.Client))
			}
			add(k.Service, client, at(v.Addr, v.Port))
		})
	case "lb-source-ranges":
		columns = []string{"SERVICE_ID", "SOURCE RANGE", "POLICY"}
		policy := map[uint32]string{}
		if err = listBatch(d.maps["lash_services"], "lash_services", func(_ bpf.ServiceKey, v bpf.Service) {
			switch v.Flags & (bpf.FrontendRanges | bpf.FrontendDeny) {
			case bpf.FrontendRanges:
				policy[v.ID] = "allow"
			case bpf.FrontendRanges | bpf.FrontendDeny:
				policy[v.ID] = "deny"
			}
		}); err != nil {
			return nil, nil, err
		}
		err = list(d.maps["lash_source_ranges"], "lash_source_ranges", func(k bpf.SourceRangeKey, _ uint32) {
			add(k.Service, bpf.IPCacheKey{Prefixlen: k.Prefixlen - 32, Addr: k.Addr}.Prefix(), policy[k.Service])
		})
	}
	sort.Slice(rows, func(i, j int) bool { return strings.Join(rows[i], "\x00") < strings.Join(rows[j], "\x00") })
	return columns, rows, err
}

func cookie(a bpf.Addr) (n uint64) {
	for i := range 8 {
		n |= uint64(a[i]) << (8 * i)
	}
	return n
}

func protoOrAny(p uint8) string {
	if p == 0 {
		return "ANY"
	}
	return model.ProtoName(p)
}

func unspecifiedLike(a bpf.Addr) netip.Addr {
	if keyAddr(a).Is4() {
		return netip.IPv4Unspecified()
	}
	return netip.IPv6Unspecified()
}

func slotRange(v bpf.Service, slot uint32) string {
	cluster := slot >= v.First && slot < v.First+v.Count
	switch {
	case slot <= v.Local && cluster:
		return " [local]"
	case slot <= v.Local:
		return " [local only]"
	}
	return ""
}

func serviceFlags(v bpf.Service) []string {
	var out []string
	switch kind := frontendType(v.Flags); {
	case v.Flags&bpf.FrontendAddress != 0:
		out = append(out, "address")
	case kind != "":
		out = append(out, kind)
	}
	if v.Flags&bpf.FrontendOutside == 0 {
		out = append(out, "non-routable")
	}
	for _, f := range []struct {
		bit  uint32
		name string
	}{
		{bpf.FrontendNode, "node"}, {bpf.FrontendLocalOut, "external-local"}, {bpf.FrontendLocalIn, "internal-local"}, {bpf.FrontendRanges, "check source-range"},
		{bpf.FrontendDeny, "deny"},
		{bpf.FrontendMaglev, "maglev"}, {bpf.FrontendDSR, "dsr"},
	} {
		if v.Flags&f.bit != 0 {
			out = append(out, f.name)
		}
	}
	if v.Affinity != 0 {
		out = append(out, fmt.Sprintf("sessionAffinity %ds", v.Affinity))
	}
	if v.Flags&bpf.FrontendAddress == 0 {
		out = append(out, fmt.Sprintf("%d backends", v.Count))
	}
	return out
}

// dumpTranslations reads lash_nat: of each translation both directions, as the field shows them.
func (d *Datapath) dumpTranslations() (columns []string, rows [][]string, err error) {
	now, err := d.now()
	if err != nil {
		return nil, nil, err
	}
	hz, err := ticksPerSecond()
	if err != nil {
		return nil, nil, err
	}
	columns = []string{"PROTO", "DIR", "FROM", "", "TO", "TRANSLATION", "AGE", "POD OR CLIENT"}
	err = listBatch(d.maps["lash_nat"], "lash_nat", func(t, owner bpf.ConnKey) {
		var c bpf.Conn
		if t.Kind == bpf.KeyLock {
			return
		}
		if d.maps["lash_conn"].Lookup(&owner, &c) != nil {
			lo, hi := sides(t, c)
			rows = append(rows, []string{protoName(t.Proto), "?", lo.String(), "->", hi.String(), "(no connection)", "", ""})
			return
		}
		client, frontend := sides(owner, c)
		age := fmt.Sprintf("Created=%dsec ago", int32(now-c.Created)/int32(hz))
		source, dest := client, frontend
		if c.Flags&bpf.ConnNAT != 0 {
			source = netip.AddrPortFrom(c.NATAddr.Addr(), c.NATPort.Host())
		}
		if c.Flags&bpf.ConnDNAT != 0 {
			dest = netip.AddrPortFrom(c.ToAddr.Addr(), c.ToPort.Host())
		}
		out, in := "XLATE_SRC "+source.String(), "XLATE_DST "+client.String()
		if c.Flags&bpf.ConnDNAT != 0 {
			out, in = out+" XLATE_DST "+dest.String(), in+" XLATE_SRC "+frontend.String()
		}
		rows = append(rows,
			[]string{protoName(t.Proto), "OUT", client.String(), "->", frontend.String(), out, age, client.String()},
			[]string{protoName(t.Proto), "IN", dest.String(), "->", source.String(), in, age, client.String()})
	})
	sort.Slice(rows, func(i, j int) bool { return strings.Join(rows[i], "\x00") < strings.Join(rows[j], "\x00") })
	return columns, rows, err
}
