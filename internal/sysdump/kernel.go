// SPDX-License-Identifier: Apache-2.0

package sysdump

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// Kernel collects what the kernel of this node has in the network namespace of this process: also what is not Lash's.
func (a *Archive) Kernel(ctx context.Context) {
	for _, p := range []Part{
		{"kernel/version.txt", func(context.Context) ([]byte, error) { return version() }},
		{"kernel/links.json", list(links)},
		{"kernel/addresses.json", list(addresses)},
		{"kernel/routes.json", list(routes)},
		{"kernel/rules.json", list(rules)},
		{"kernel/neighbours.json", list(neighbours)},
		{"kernel/tc.json", list(filters)},
		{"kernel/sysctls.txt", func(context.Context) ([]byte, error) { return sysctls() }},
		{"kernel/bpffs.txt", func(context.Context) ([]byte, error) { return tree("/sys/fs/bpf/lash") }},
		{"kernel/cni.txt", func(context.Context) ([]byte, error) { return files("/etc/cni/net.d/*") }},
		{"config.txt", func(context.Context) ([]byte, error) { return files("/etc/lash/config/*") }},
	} {
		a.Collect(ctx, partLimit, p)
	}
	for _, f := range []string{"uptime", "loadavg", "meminfo", "modules", "interrupts", "softirqs", "thread-self/mountinfo", "thread-self/cgroup",
		"thread-self/net/dev", "thread-self/net/snmp", "thread-self/net/snmp6", "thread-self/net/netstat", "thread-self/net/softnet_stat", "thread-self/net/sockstat"} {
		b, err := os.ReadFile("/proc/" + f)
		switch {
		case err == nil:
			a.Add("kernel/proc/"+strings.ReplaceAll(strings.TrimPrefix(f, "thread-self/"), "/", "-")+".txt", b)
		case !errors.Is(err, os.ErrNotExist):
			a.Fail("kernel/proc/"+f, err)
		}
	}
}

func version() ([]byte, error) {
	var u unix.Utsname
	if err := unix.Uname(&u); err != nil {
		return nil, err
	}
	var b bytes.Buffer
	for _, s := range [][]byte{u.Sysname[:], u.Nodename[:], u.Release[:], u.Version[:], u.Machine[:]} {
		fmt.Fprintf(&b, "%s ", unix.ByteSliceToString(s))
	}
	b.WriteByte('\n')
	return b.Bytes(), nil
}

// list makes a file of a list of the kernel's. What is there in spite of an error is in it.
func list[T any](get func() ([]T, error)) func(context.Context) ([]byte, error) {
	return func(context.Context) ([]byte, error) {
		rows, err := get()
		b, failed := json.Marshal(rows)
		return b, errors.Join(err, failed)
	}
}

type link struct {
	Index   int    `json:"index"`
	Name    string `json:"name"`
	Type    string `json:"type"`
	MTU     int    `json:"mtu"`
	State   string `json:"state"`
	Flags   string `json:"flags"`
	MAC     string `json:"mac,omitempty"`
	Alias   string `json:"alias,omitempty"`
	Parent  int    `json:"parent,omitempty"` // of a veth, its peer
	Master  int    `json:"master,omitempty"`
	NetNsID int    `json:"netnsid"`
	GSOMax  uint32 `json:"gsoMax,omitempty"`
	GROMax  uint32 `json:"groMax,omitempty"`
	TxQLen  int    `json:"txQLen,omitempty"`

	RxPackets, TxPackets, RxErrors, TxErrors, RxDropped, TxDropped uint64 `json:",omitempty"`
}

func links() ([]link, error) {
	all, err := netlink.LinkList()
	var out []link
	for _, l := range all {
		x := l.Attrs()
		row := link{Index: x.Index, Name: x.Name, Type: l.Type(), MTU: x.MTU, State: x.OperState.String(), Flags: x.Flags.String(), MAC: x.HardwareAddr.String(),
			Alias: x.Alias, Parent: x.ParentIndex, Master: x.MasterIndex, NetNsID: x.NetNsID, GSOMax: x.GSOMaxSize, GROMax: x.GROMaxSize, TxQLen: x.TxQLen}
		if s := x.Statistics; s != nil {
			row.RxPackets, row.TxPackets, row.RxErrors, row.TxErrors, row.RxDropped, row.TxDropped = s.RxPackets, s.TxPackets, s.RxErrors, s.TxErrors, s.RxDropped, s.TxDropped
		}
		out = append(out, row)
	}
	return out, err
}

type address struct {
	Ifindex int    `json:"ifindex"`
	Addr    string `json:"addr"`
	Scope   int    `json:"scope"`
	Flags   int    `json:"flags"`
}

func addresses() ([]address, error) {
	all, err := netlink.AddrList(nil, netlink.FAMILY_ALL)
	var out []address
	for _, x := range all {
		out = append(out, address{x.LinkIndex, text(x.IPNet), x.Scope, x.Flags})
	}
	return out, err
}

type route struct {
	Table    int      `json:"table"`
	Dst      string   `json:"dst"`
	Type     int      `json:"type"`
	Via      string   `json:"via,omitempty"`
	Ifindex  int      `json:"ifindex,omitempty"`
	Src      string   `json:"src,omitempty"`
	MTU      int      `json:"mtu,omitempty"`
	Protocol string   `json:"protocol"`
	Scope    string   `json:"scope"`
	Metric   int      `json:"metric,omitempty"`
	Flags    []string `json:"flags,omitempty"`
	NextHops []string `json:"nextHops,omitempty"`
}

func routes() ([]route, error) {
	var out []route
	var errs []error
	for _, family := range []int{netlink.FAMILY_V4, netlink.FAMILY_V6} {
		all, err := netlink.RouteListFiltered(family, &netlink.Route{Table: unix.RT_TABLE_UNSPEC}, netlink.RT_FILTER_TABLE)
		errs = append(errs, err)
		for _, x := range all {
			row := route{Table: x.Table, Dst: text(x.Dst), Type: x.Type, Ifindex: x.LinkIndex, MTU: x.MTU, Protocol: x.Protocol.String(), Scope: x.Scope.String(), Metric: x.Priority, Flags: x.ListFlags()}
			if x.Gw != nil {
				row.Via = x.Gw.String()
			}
			if x.Src != nil {
				row.Src = x.Src.String()
			}
			for _, hop := range x.MultiPath {
				row.NextHops = append(row.NextHops, hop.String())
			}
			out = append(out, row)
		}
	}
	return out, errors.Join(errs...)
}

func rules() ([]string, error) {
	all, err := netlink.RuleList(netlink.FAMILY_ALL)
	var out []string
	for _, x := range all {
		out = append(out, fmt.Sprintf("family %d %v", x.Family, x))
	}
	return out, err
}

type neighbour struct {
	Ifindex int    `json:"ifindex"`
	IP      string `json:"ip"`
	MAC     string `json:"mac,omitempty"`
	State   int    `json:"state"` // NUD_*
	Flags   int    `json:"flags,omitempty"`
}

func neighbours() ([]neighbour, error) {
	all, err := netlink.NeighList(0, netlink.FAMILY_ALL)
	var out []neighbour
	for _, x := range all {
		out = append(out, neighbour{x.LinkIndex, x.IP.String(), x.HardwareAddr.String(), x.State, x.Flags})
	}
	return out, err
}

type filter struct {
	Device   string `json:"device"`
	Hook     string `json:"hook"` // qdisc, ingress, egress
	Type     string `json:"type"`
	Name     string `json:"name,omitempty"`
	Priority uint16 `json:"priority,omitempty"`
	ID       int    `json:"id,omitempty"` // of the program
	Tag      string `json:"tag,omitempty"`
}

// filters are the queueing disciplines and the filters of clsact; what is attached by tcx is in bpf/net.json.
func filters() ([]filter, error) {
	all, err := netlink.LinkList()
	out, errs := []filter{}, []error{err}
	for _, l := range all {
		name := l.Attrs().Name
		qdiscs, err := netlink.QdiscList(l)
		errs = append(errs, err)
		for _, q := range qdiscs {
			out = append(out, filter{Device: name, Hook: "qdisc", Type: q.Type()})
		}
		for hook, parent := range map[string]uint32{"ingress": netlink.HANDLE_MIN_INGRESS, "egress": netlink.HANDLE_MIN_EGRESS} {
			found, err := netlink.FilterList(l, parent)
			if err != nil { // no clsact there
				continue
			}
			for _, f := range found {
				row := filter{Device: name, Hook: hook, Type: f.Type(), Priority: f.Attrs().Priority}
				if b, ok := f.(*netlink.BpfFilter); ok {
					row.Name, row.ID, row.Tag = b.Name, b.Id, b.Tag
				}
				out = append(out, row)
			}
		}
	}
	slices.SortStableFunc(out, func(x, y filter) int { return strings.Compare(x.Device+x.Hook, y.Device+y.Hook) })
	return out, errors.Join(errs...)
}

// sysctls are those that decide what becomes of a packet, for each device.
func sysctls() ([]byte, error) {
	var b bytes.Buffer
	for _, pattern := range []string{
		"net/ipv4/ip_forward", "net/ipv4/conf/*/rp_filter", "net/ipv4/conf/*/forwarding", "net/ipv4/conf/*/accept_local", "net/ipv4/conf/*/arp_ignore", "net/ipv4/conf/*/arp_announce",
		"net/ipv4/conf/*/proxy_arp", "net/ipv6/conf/*/forwarding", "net/ipv6/conf/*/disable_ipv6", "net/ipv6/conf/*/accept_ra", "net/ipv4/neigh/default/gc_thresh*", "net/ipv6/neigh/default/gc_thresh*",
		"net/ipv4/ip_local_port_range", "net/ipv4/tcp_congestion_control", "net/ipv4/tcp_mtu_probing", "net/core/bpf_jit_*", "net/core/default_qdisc", "net/core/rmem_max", "net/core/wmem_max", "net/core/somaxconn",
		"net/core/netdev_max_backlog", "net/bridge/bridge-nf-call-*", "net/netfilter/nf_conntrack_max", "kernel/unprivileged_bpf_disabled", "kernel/osrelease",
	} {
		paths, err := filepath.Glob("/proc/sys/" + pattern)
		if err != nil {
			return nil, err
		}
		for _, p := range paths {
			v, err := os.ReadFile(p)
			if err != nil {
				v = []byte("(" + err.Error() + ")")
			}
			fmt.Fprintf(&b, "%s = %s\n", strings.ReplaceAll(strings.TrimPrefix(p, "/proc/sys/"), "/", "."), bytes.TrimSpace(v))
		}
	}
	return b.Bytes(), nil
}

func tree(root string) ([]byte, error) {
	var b bytes.Buffer
	err := filepath.WalkDir(root, func(path string, d fs.DirEntry, err error) error {
		if err == nil {
			fmt.Fprintln(&b, path)
		}
		return err
	})
	if errors.Is(err, os.ErrNotExist) {
		err = nil
	}
	return b.Bytes(), err
}

// files are the contents of small files, one after the other. The directories of a mounted ConfigMap are left out.
func files(pattern string) ([]byte, error) {
	paths, err := filepath.Glob(pattern)
	if err != nil {
		return nil, err
	}
	var b bytes.Buffer
	var errs []error
	for _, p := range paths {
		if st, err := os.Stat(p); err != nil || !st.Mode().IsRegular() || st.Size() > 1<<20 {
			continue
		}
		v, err := os.ReadFile(p)
		errs = append(errs, err)
		// The name as in a ConfigMap, so that a value is known by it.
		fmt.Fprintf(&b, "# %s\n%s: %s\n", p, filepath.Base(p), bytes.TrimSpace(v))
	}
	return b.Bytes(), errors.Join(errs...)
}

func text(n *net.IPNet) string {
	if n == nil {
		return "default"
	}
	return n.String()
}
