// SPDX-License-Identifier: Apache-2.0

package datapath

import (
	"errors"
	"fmt"
	"net"
	"net/netip"
	"sort"
	"strings"

	"github.com/lash-net/lash/bpf"
	"github.com/lash-net/lash/internal/model"
)

// Dump reads one kind of map as a table of text: "endpoint", "device", "ct", "ipcache", "ipmasq",
// "tunnel", "lb", "lb-backends", "lb-maglev", "lb-affinity",
// "lb-source-ranges", "nat", "socket", "metrics" or "net". Rows are sorted.
func (d *Datapath) Dump(kind string) (columns []string, rows [][]string, err error) {
	add := func(cells ...any) {
		row := make([]string, len(cells))
		for i, c := range cells {
			row[i] = fmt.Sprint(c)
		}
		rows = append(rows, row)
	}
	switch kind {
	case "net":
		return d.Attachments()
	case "endpoint":
		columns = []string{"IP ADDRESS", "LOCAL ENDPOINT INFO"}
		err = list(d.maps["lash_endpoints"], "lash_endpoints", func(k bpf.Addr, v bpf.Endpoint) {
			if v.Flags&bpf.EndpointHost != 0 {
				add(k.Addr(), "(localhost)")
				return
			}
			add(k.Addr(), fmt.Sprintf("id=%-5d sec_id=%-5d flags=0x%04x ifindex=%-3d mac=%s nodemac=%s", v.ID, v.Identity, v.Flags, v.Ifindex,
				strings.ToUpper(model.MAC(v.MAC.B).String()), strings.ToUpper(model.MAC(v.NodeMAC.B).String())))
		})
	case "device":
		columns = []string{"IFINDEX", "DEVICE", "SIDE", "IPv4", "IPv6", "MAC"}
		row := func(ifindex uint32, side string, v4, v6 bpf.Addr, mac bpf.MAC) {
			name := "(gone)"
			if dev, err := net.InterfaceByIndex(int(ifindex)); err == nil {
				name = dev.Name
			}
			add(ifindex, name, side, text(v4), text(v6), model.MAC(mac.B))
		}
		err = errors.Join(
			list(d.maps["lash_ifaces"], "lash_ifaces", func(k uint32, v bpf.Iface) { row(k, "pod", v.IP4, v.IP6, v.MAC) }),
			list(d.maps["lash_devices"], "lash_devices", func(k uint32, v bpf.Device) { row(k, "network", v.IP4, v.IP6, v.MAC) }))
	case "ipcache":
		columns = []string{"IP PREFIX/ADDRESS", "IDENTITY"}
		err = list(d.maps["lash_ipcache"], "lash_ipcache", func(k bpf.IPCacheKey, v bpf.IPCacheEntry) {
			node := netip.IPv4Unspecified()
			if n := v.Node.Addr(); n.IsValid() {
				node = n
			}
			flags := "<none>"
			if v.Flags&bpf.IPCacheTunnel != 0 {
				flags = "hastunnel"
			}
			add(k.Prefix(), fmt.Sprintf("identity=%d encryptkey=0 tunnelendpoint=%s flags=%s", v.Identity, node, flags))
		})
	case "tunnel":
		columns = []string{"TUNNEL", "VALUE"}
		err = list(d.maps["lash_ipcache"], "lash_ipcache", func(k bpf.IPCacheKey, v bpf.IPCacheEntry) {
			if p := k.Prefix(); v.Flags&bpf.IPCacheTunnel != 0 && !p.IsSingleIP() { // single addresses are pods known better
				add(netip.AddrPortFrom(p.Addr(), 0), netip.AddrPortFrom(v.Node.Addr(), 0))
			}
		})
	case "ipmasq":
		columns = []string{"IP PREFIX/ADDRESS"}
		err = list(d.maps["lash_ipmasq"], "lash_ipmasq", func(k bpf.IPCacheKey, _ uint32) { add(k.Prefix()) })
	case "lb", "lb-backends", "lb-maglev", "lb-affinity", "lb-source-ranges":
		return d.dumpServices(kind)
	case "ct":
		return d.dumpConnections()
	case "nat":
		return d.dumpTranslations()
	case "socket":
		columns = []string{"COOKIE", "BACKEND", "SERVICE ADDRESS", "SERVICE_ID"}
		err = list(d.maps["lash_sock_rev"], "lash_sock_rev", func(k bpf.SockRevKey, v bpf.SockRev) {
			add(k.Cookie, netip.AddrPortFrom(k.Addr.Addr(), k.Port.Host()), netip.AddrPortFrom(v.Addr.Addr(), v.Port.Host()), v.Service)
		})
	case "metrics":
		return d.dumpMetrics()
	default:
		return nil, nil, fmt.Errorf("bpf table %q: there is none of that name; there are ct, device, endpoint, ipcache, ipmasq, lb, lb-backends, lb-maglev, lb-affinity, lb-source-ranges, metrics, nat, net, socket, tunnel", kind)
	}
	sort.Slice(rows, func(i, j int) bool { return strings.Join(rows[i], "\x00") < strings.Join(rows[j], "\x00") })
	return columns, rows, err
}

// text of an address; none is empty.
func text(a bpf.Addr) string {
	if a == (bpf.Addr{}) {
		return ""
	}
	return a.Addr().String()
}

// ProtoName names a protocol as the tables do.
func ProtoName(p uint8) string { return protoName(p) }

func protoName(p uint8) string {
	switch p {
	case 1:
		return "ICMP"
	case 58:
		return "ICMPv6"
	}
	return model.ProtoName(p)
}

// sides are the initiator and its peer.
func sides(k bpf.ConnKey, c bpf.Conn) (initiator, peer netip.AddrPort) {
	lo := netip.AddrPortFrom(k.Lo.Addr(), k.LoPort.Host())
	hi := netip.AddrPortFrom(k.Hi.Addr(), k.HiPort.Host())
	if c.Flags&bpf.ConnInitiatorHi != 0 {
		return hi, lo
	}
	return lo, hi
}

var actionNames = [...]string{
	bpf.ActionNone: "undecided", bpf.ActionPeer: "pod", bpf.ActionEgress: "redirect", bpf.ActionHost: "host", bpf.ActionPass: "stack", bpf.ActionNeigh: "neighbour", bpf.ActionTunnel: "tunnel",
}

func (d *Datapath) dumpConnections() ([]string, [][]string, error) {
	now, err := d.now()
	if err != nil {
		return nil, nil, err
	}
	hz, err := ticksPerSecond()
	if err != nil {
		return nil, nil, err
	}
	columns := []string{"PROTO", "SOURCE", "DESTINATION", "STATE", "EXPIRES", "FORTH", "PACKETS", "BYTES", "BACK", "PACKETS", "BYTES", "NAT"}
	var rows [][]string
	err = list(d.maps["lash_conn"], "lash_conn", func(k bpf.ConnKey, c bpf.Conn) {
		src, dst := sides(k, c)
		state := "new"
		switch {
		case c.State&bpf.StateClosed != 0 || c.State&bpf.StateFINBoth == bpf.StateFINBoth:
			state = "closed"
		case c.State&bpf.StateReplied != 0:
			state = "established"
		}
		nat := ""
		if c.Flags&bpf.ConnNAT != 0 {
			nat = netip.AddrPortFrom(c.NATAddr.Addr(), c.NATPort.Host()).String()
		}
		way := func(dir bpf.ConnDir) string {
			if int(dir.Action) >= len(actionNames) || dir.Epoch == 0 {
				return "undecided"
			}
			if dir.OutIfindex != 0 {
				return fmt.Sprintf("%s ifindex %d", actionNames[dir.Action], dir.OutIfindex)
			}
			return actionNames[dir.Action]
		}
		rows = append(rows, []string{protoName(k.Proto), src.String(), dst.String(), state, fmt.Sprintf("%ds", int32(c.Expires-now)/int32(hz)),
			way(c.Orig), fmt.Sprint(c.Orig.Packets), fmt.Sprint(c.Orig.Bytes), way(c.Reply), fmt.Sprint(c.Reply.Packets), fmt.Sprint(c.Reply.Bytes), nat})
	})
	sort.Slice(rows, func(i, j int) bool { return strings.Join(rows[i], "\x00") < strings.Join(rows[j], "\x00") })
	return columns, rows, err
}

var hookNames = [bpf.Hooks]string{
	bpf.HookPod: "from-container", bpf.HookNetdev: "from-netdev", bpf.HookHost: "from-host", bpf.HookNetdevOut: "to-netdev", bpf.HookSock: "sock", bpf.HookOverlay: "from-overlay",
	bpf.HookLocal: "sockmap", bpf.HookXDP: "xdp",
}

var slowNames = [bpf.CountRows]string{
	bpf.SlowNot: "Success", bpf.SlowNew: "Slow path: new connection", bpf.SlowUndecided: "Slow path: direction not decided yet",
	bpf.SlowEpoch: "Slow path: something changed", bpf.SlowDeadline: "Slow path: route due for another look",
	bpf.SlowElsewhere: "Slow path: arrived at another device", bpf.SlowReopened: "Slow path: connection reopened",
	bpf.SlowFragment: "Slow path: fragment", bpf.SlowICMPError: "Slow path: ICMP error", bpf.SlowExtension: "Slow path: options or extension headers",
	bpf.SlowTTL: "To the stack: TTL exceeded", bpf.SlowMTU: "To the stack: fragmentation needed", bpf.SlowUnrouted: "To the stack: no route of Lash's",
	bpf.SlowNeighbour: "Slow path: neighbour unknown", bpf.SlowMasquerade: "Slow path: masquerading",
	bpf.SlowReport: "Fast path, with an event", bpf.SlowRefused: "Service without backend or port: refused", bpf.SlowEcho: "Ping of a service's address: answered",
	bpf.SlowBulk: "Sockmap: too much at once, by packets from here",
}

func sum(perCPU []bpf.Count) (total bpf.Count) {
	for _, c := range perCPU {
		total.Packets += c.Packets
		total.Bytes += c.Bytes
	}
	return total
}

func (d *Datapath) dumpMetrics() ([]string, [][]string, error) {
	columns := []string{"REASON", "HOOK", "PACKETS", "BYTES", "LINE", "FILE"}
	var rows [][]string
	for hook := range bpf.Hooks {
		for why := range bpf.CountRows {
			var perCPU []bpf.Count
			if err := d.maps["lash_counts"].Lookup(uint32(hook*bpf.CountRows+why), &perCPU); err != nil {
				return nil, nil, fmt.Errorf("read lash_counts: %w", err)
			}
			if c := sum(perCPU); c.Packets > 0 {
				rows = append(rows, []string{slowNames[why], hookNames[hook], fmt.Sprint(c.Packets), fmt.Sprint(c.Bytes), "", ""})
			}
		}
	}
	var perCPU []bpf.Count
	var k bpf.DropKey
	it := d.maps["lash_drops"].Iterate()
	for it.Next(&k, &perCPU) {
		c := sum(perCPU)
		hook := fmt.Sprint(k.Dir)
		if int(k.Dir) < len(hookNames) {
			hook = hookNames[k.Dir]
		}
		rows = append(rows, []string{bpf.DropName(k.Reason), hook, fmt.Sprint(c.Packets), fmt.Sprint(c.Bytes), fmt.Sprint(k.Line), bpf.FileName(k.File)})
	}
	if err := it.Err(); err != nil {
		return nil, nil, fmt.Errorf("read lash_drops: %w", err)
	}
	sort.SliceStable(rows, func(i, j int) bool { return rows[i][0] < rows[j][0] })
	return columns, rows, nil
}
