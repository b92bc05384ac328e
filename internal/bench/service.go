// SPDX-License-Identifier: Apache-2.0

package bench

import (
	"fmt"
	"net/netip"
	"os"
	"path/filepath"

	"github.com/cilium/ebpf"
	"golang.org/x/sys/unix"

	"github.com/lash-net/lash/bpf"
)

// manyServices is how many others a service's rows stand among.
const manyServices = 10000

// serviceVIPs are the frontends of the bench: one a family, its backend the server of the cell.
var serviceVIPs = map[bool]netip.AddrPort{ // by Is6
	false: netip.MustParseAddrPort("10.96.0.1:80"), true: netip.MustParseAddrPort("[fd96::1]:80"),
}

// group makes a control group, to which nothing is attached.
func (t *Topology) group(name string) (*os.File, error) {
	mount, err := os.MkdirTemp("", "lash-bench-")
	if err != nil {
		return nil, err
	}
	t.Defer(func() { os.Remove(mount) })
	if err := unix.Mount("none", mount, "cgroup2", 0, ""); err != nil { // seen by this process only, see EnterMounts
		return nil, fmt.Errorf("mount cgroup2: %w", err)
	}
	t.Defer(func() { _ = unix.Unmount(mount, unix.MNT_DETACH) })
	path := filepath.Join(mount, fmt.Sprintf("lash-bench-%s-%d", name, os.Getpid()))
	if err := os.Mkdir(path, 0o755); err != nil {
		return nil, err
	}
	t.Defer(func() { os.Remove(path) })
	f, err := os.Open(path)
	if err == nil {
		t.Defer(func() { f.Close() })
	}
	return f, err
}

// hooked makes a control group with the socket programs of the cluster's first node, once.
func (t *Topology) hooked(c *lashCluster) (_ *os.File, err error) {
	if c.group == nil {
		if c.group, err = t.group("services"); err == nil {
			t.Defer(func() { _ = c.n.datapath.DetachCgroup() })
			err = c.n.datapath.AttachCgroup(c.group.Name())
		}
	}
	return c.group, err
}

// lashHooks is lash-same with the socket programs attached, but no service asked for.
func lashHooks(t *Topology) (Pair, error) {
	c, err := t.lash(native)
	if err != nil {
		return Pair{}, err
	}
	pair, err := lashSame(t)
	if err == nil {
		pair.Group, err = t.hooked(c)
	}
	return pair, err
}

// lashService is lash-same by a ClusterIP.
func lashService(t *Topology) (Pair, error) {
	c, err := t.lash(native)
	if err != nil {
		return Pair{}, err
	}
	pair, err := lashHooks(t)
	if err != nil {
		return Pair{}, err
	}
	services, backends := c.n.datapath.Map("lash_services"), c.n.datapath.Map("lash_backends")
	for i := range uint32(manyServices) {
		other := netip.AddrFrom4([4]byte{10, 97, byte(i >> 8), byte(i)})
		if err := addService(services, backends, netip.AddrPortFrom(other, 80), i+100, netip.AddrPortFrom(pair.Server4, 1)); err != nil {
			return Pair{}, err
		}
	}
	pair.Frontend = clusterIP(services, backends)
	return pair, nil
}

// clusterIP leads a client to the server by a ClusterIP.
func clusterIP(services, backends *ebpf.Map) func(netip.AddrPort) (netip.AddrPort, error) {
	return func(server netip.AddrPort) (netip.AddrPort, error) {
		vip := serviceVIPs[server.Addr().Is6()]
		return vip, addService(services, backends, vip, uint32(server.Addr().BitLen()), server)
	}
}

// lashPackets is lash-service without the socket programs: each packet is translated, and each answer back.
func lashPackets(t *Topology) (Pair, error) {
	c, err := t.lash(native)
	if err != nil {
		return Pair{}, err
	}
	pair, err := lashSame(t)
	if err != nil {
		return Pair{}, err
	}
	pair.Frontend = clusterIP(c.n.datapath.Map("lash_services"), c.n.datapath.Map("lash_backends"))
	return pair, nil
}

// addService writes a service port with one backend.
func addService(services, backends *ebpf.Map, frontend netip.AddrPort, id uint32, backend netip.AddrPort) error {
	slot := bpf.Backend{Addr: bpf.AddrFrom(backend.Addr()), Port: bpf.ToBE16(backend.Port()), Proto: unix.IPPROTO_TCP}
	if err := backends.Put(&bpf.BackendKey{Service: id, Slot: 1}, &slot); err != nil {
		return fmt.Errorf("backend of %s: %w", frontend, err)
	}
	key := bpf.ServiceKey{Addr: bpf.AddrFrom(frontend.Addr()), Port: bpf.ToBE16(frontend.Port()), Proto: unix.IPPROTO_TCP}
	if err := services.Put(&key, &bpf.Service{ID: id, First: 1, Count: 1, Local: 1}); err != nil {
		return fmt.Errorf("service %s: %w", frontend, err)
	}
	return nil
}
