// SPDX-License-Identifier: Apache-2.0

package netdev

import (
	"bytes"
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"fmt"
	"net/netip"
	"slices"

	"github.com/google/nftables"
	"github.com/google/nftables/expr"
	"golang.org/x/sys/unix"
)

// Masquerade is what netfilter is to masquerade in one family, where BPF does not.
type Masquerade struct {
	Pods                []netip.Prefix // sources
	Except              []netip.Prefix // destinations that see pods' own addresses
	FirstPort, LastPort uint16         // of translated connections
}

// The table and chain of ours, in each family.
const (
	netfilterTable = "lash"
	netfilterChain = "LASH_POST_nat"
)

// SetMasquerade makes the node's netfilter masquerade as m says, or takes our rules away if m is nil, and reports
// whether anything had to be changed. Rules that somebody removed come back. partial: m may lack exceptions that are not
// known yet, so that rules that are there are better.
func (h *Host) SetMasquerade(ipv6 bool, m *Masquerade, partial bool) (changed bool, err error) {
	err = h.inNetns(func() error {
		conn, err := nftables.New()
		if err != nil {
			return err
		}
		n := netfilter{conn: conn, table: &nftables.Table{Name: netfilterTable, Family: nftables.TableFamilyIPv4}, ipv6: ipv6}
		if ipv6 {
			n.table.Family = nftables.TableFamilyIPv6
		}
		there, err := n.there()
		switch {
		case errors.Is(err, unix.EOPNOTSUPP) || errors.Is(err, unix.EINVAL):
			if m == nil {
				return nil // a kernel without nf_tables has no rules of ours
			}
			return fmt.Errorf("this kernel has no nf_tables: load the modules nf_tables and nft_masq, or set enable-bpf-masquerade to true")
		case err != nil:
			return err
		case m == nil && !there, partial && there:
			return nil
		case m == nil:
			conn.DelTable(n.table)
		default:
			if same, err := n.same(m); same || err != nil {
				return err
			}
			n.write(m)
		}
		changed = true
		return conn.Flush()
	})
	if err != nil {
		return false, fmt.Errorf("netfilter table %s: %w", netfilterTable, err)
	}
	return changed, nil
}

func (h *Host) inNetns(f func() error) error {
	if h.ns == nil {
		return f()
	}
	return inNetns(h.ns, f)
}

type netfilter struct {
	conn  *nftables.Conn
	table *nftables.Table
	ipv6  bool
}

func (n *netfilter) there() (bool, error) {
	tables, err := n.conn.ListTablesOfFamily(n.table.Family)
	return slices.ContainsFunc(tables, func(t *nftables.Table) bool { return t.Name == n.table.Name }), err
}

// sum is what our rules carry, so that they are known to be these.
func (m *Masquerade) sum() []byte {
	s := sha256.Sum256(fmt.Appendf(nil, "1 %v %v %d %d", m.Pods, m.Except, m.FirstPort, m.LastPort))
	return s[:16]
}

// same reports whether the kernel has exactly these rules.
func (n *netfilter) same(m *Masquerade) (bool, error) {
	chain, err := n.conn.ListChain(n.table, netfilterChain)
	if err != nil || chain.Hooknum == nil || *chain.Hooknum != *nftables.ChainHookPostrouting || chain.Type != nftables.ChainTypeNAT {
		return false, nil // the table or the chain is missing
	}
	rules, err := n.conn.GetRules(n.table, chain)
	if err != nil {
		return false, err
	}
	wanted := n.rules(m, nil)
	if len(rules) != len(wanted) || slices.ContainsFunc(rules, func(r *nftables.Rule) bool { return !bytes.Equal(r.UserData, m.sum()) }) {
		return false, nil
	}
	for name, prefixes := range map[string][]netip.Prefix{"pods": m.Pods, "except": m.Except} {
		set, err := n.conn.GetSetByName(n.table, name)
		if err != nil {
			return false, nil
		}
		have, err := n.conn.GetSetElements(set)
		if err != nil {
			return false, err
		}
		starts := func(elements []nftables.SetElement) (out []string) {
			for _, e := range elements {
				if !e.IntervalEnd {
					out = append(out, string(e.Key))
				}
			}
			slices.Sort(out)
			return out
		}
		if !slices.Equal(starts(have), starts(n.elements(prefixes))) {
			return false, nil
		}
	}
	return true, nil
}

// write replaces the table by one that masquerades as m says, at once.
func (n *netfilter) write(m *Masquerade) {
	n.conn.AddTable(n.table) // so that there is one to delete
	n.conn.DelTable(n.table)
	n.conn.AddTable(n.table)
	key := nftables.TypeIPAddr
	if n.ipv6 {
		key = nftables.TypeIP6Addr
	}
	sets := map[string]*nftables.Set{}
	for _, s := range []struct {
		name     string
		prefixes []netip.Prefix
	}{{"pods", m.Pods}, {"except", m.Except}} {
		sets[s.name] = &nftables.Set{Table: n.table, Name: s.name, KeyType: key, Interval: true}
		if err := n.conn.AddSet(sets[s.name], n.elements(s.prefixes)); err != nil {
			panic(err) // of a set without a table or key
		}
	}
	chain := n.conn.AddChain(&nftables.Chain{
		Name: netfilterChain, Table: n.table, Type: nftables.ChainTypeNAT, Hooknum: nftables.ChainHookPostrouting, Priority: nftables.ChainPriorityNATSource,
	})
	for _, exprs := range n.rules(m, sets) {
		n.conn.AddRule(&nftables.Rule{Table: n.table, Chain: chain, Exprs: exprs, UserData: m.sum()})
	}
}

// rules are, one after the other: what goes to our own devices stays as it is, what does not come from pods, what goes to
// where pods are known; the rest is masqueraded.
func (n *netfilter) rules(m *Masquerade, sets map[string]*nftables.Set) [][]expr.Any {
	source, length := uint32(12), uint32(4)
	if n.ipv6 {
		source, length = 8, 16
	}
	back := &expr.Verdict{Kind: expr.VerdictReturn}
	lookup := func(name string, offset uint32, invert bool) []expr.Any {
		l := &expr.Lookup{SourceRegister: 1, SetName: name, Invert: invert}
		if s := sets[name]; s != nil {
			l.SetID = s.ID
		}
		return []expr.Any{&expr.Payload{DestRegister: 1, Base: expr.PayloadBaseNetworkHeader, Offset: offset, Len: length}, l, back}
	}
	port := func(register uint32, p uint16) expr.Any {
		return &expr.Immediate{Register: register, Data: binary.BigEndian.AppendUint16(nil, p)}
	}
	return [][]expr.Any{
		{&expr.Meta{Key: expr.MetaKeyOIFNAME, Register: 1}, &expr.Cmp{Op: expr.CmpOpEq, Register: 1, Data: []byte("lash_")}, back},
		lookup("pods", source, true),
		lookup("except", source+length, false),
		{port(1, m.FirstPort), port(2, m.LastPort), &expr.Masq{ToPorts: true, RegProtoMin: 1, RegProtoMax: 2}},
	}
}

// elements are the prefixes as ranges that neither overlap nor touch.
func (n *netfilter) elements(prefixes []netip.Prefix) (out []nftables.SetElement) {
	sorted := slices.Clone(prefixes)
	slices.SortFunc(sorted, func(a, b netip.Prefix) int { return a.Addr().Compare(b.Addr()) })
	var end netip.Addr // of the range that is open, exclusive
	for i, p := range sorted {
		next := after(p)
		switch {
		case i > 0 && !end.IsValid():
			return out // the open range has no end
		case i > 0 && p.Addr().Compare(end) <= 0: // it goes on
			if !next.IsValid() || next.Compare(end) > 0 {
				end = next
			}
			continue
		case i > 0:
			out = append(out, nftables.SetElement{Key: end.AsSlice(), IntervalEnd: true})
		}
		out = append(out, nftables.SetElement{Key: p.Addr().AsSlice()})
		end = next
	}
	if end.IsValid() {
		out = append(out, nftables.SetElement{Key: end.AsSlice(), IntervalEnd: true})
	}
	return out
}

// after is the first address after those of p; invalid: they are the last ones.
func after(p netip.Prefix) netip.Addr {
	b := p.Masked().Addr().AsSlice()
	for i := p.Bits(); i < len(b)*8; i++ {
		b[i/8] |= 0x80 >> (i % 8)
	}
	last, _ := netip.AddrFromSlice(b)
	return last.Next()
}
