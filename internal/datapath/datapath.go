// SPDX-License-Identifier: Apache-2.0

package datapath

import (
	"cmp"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"net/netip"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"sync"
	"time"

	"github.com/cilium/ebpf"
	"golang.org/x/sys/unix"

	"github.com/lash-net/lash/bpf"
	"github.com/lash-net/lash/internal/model"
)

// Config becomes load-time constants and map sizes.
type Config struct {
	Root string // directory on a bpffs; maps, programs, links below it. Empty: nothing is pinned, for test runs of the programs

	HostIfindex   int // lash_host
	HostMAC       model.MAC
	DirectIfindex int // the device that routes to other nodes
	Routers       []netip.Addr
	PodCIDRs      []netip.Prefix // of this node; more than one of a family: every packet is looked up
	NativeCIDRs   []netip.Prefix // at most one a family; never masqueraded

	OverlayIfindex int    // the tunnel device; 0: there is none
	TunnelPort     uint16 // its UDP port
	TunnelGeneve   bool   // its protocol; false: VXLAN
	TunnelMTU      int    // bytes that a packet in it may have

	DSR       bool   // nodes pass connections from outside on with an option, and backends' nodes answer themselves
	DSRGeneve bool   // this node's option is one of Geneve, where the network sees it; false: an IP option
	DSRPort   uint16 // UDP port of that Geneve

	HostRouting bool // BPF host routing; false: legacy
	Masquerade4 bool
	Masquerade6 bool
	SNATMin     uint16 // source ports of masqueraded connections
	SNATMax     uint16
	SNATFarMin  uint16 // those used too when there is none left of the others
	SNATFarMax  uint16 // 0: there are none

	AnyLifetime time.Duration // of connections without packets that are not TCP, whole seconds; 0: a minute

	ConnMax    uint32 // rows of lash_conn
	ServiceMax uint32 // rows of lash_services; four times as many backends

	NoServices       bool         // kube-proxy serves packets that ask for services
	NodeAddrs        []netip.Addr // of the node on the direct device, at most one a family
	OutsideClusterIP bool         // packets from outside reach ClusterIPs
	DropNoBackend    bool         // connections to services without backends are dropped, not refused
	NoBindProtection bool         // sockets of the node may bind NodePorts
	SockHostOnly     bool         // pods' sockets are left alone: packets to services are translated
	MaglevSize       uint32       // entries of a Maglev table, a prime; 0: 16381
	MaglevSeed       []byte       // the same on all nodes

	NoTCX bool // attach by clsact even where tcx exists

	XDP       bool // AttachXDP is going to be called
	XDPSpread bool // what XDP passes to the kernel is spread over all CPUs
}

// Lifetimes of connections without packets.
const (
	lifetimeTCP   = 8000 * time.Second
	lifetimeSYN   = 60 * time.Second
	lifetimeClose = 10 * time.Second
	lifetimeAny   = 60 * time.Second
)

// Datapath is the loaded programs and the maps they share.
type Datapath struct {
	cfg      Config
	log      *slog.Logger
	features Features
	maps     map[string]*ebpf.Map
	programs map[string]*ebpf.Program
	kept     map[string]bool // directories of programs that this agent has pinned, or found

	local error // why sockets of a pod cannot do without packets; nil: they can
	xdp   error // why there is no XDP; nil: there is

	mu       sync.Mutex // serialises changes of lash_runtime and of what follows
	ifaces   map[uint32]bpf.Iface
	departed map[netip.Prefix]bool // taken from the ipcache; Sweep has not looked for them yet
	snat     snatPorts
	locks    map[bpf.ConnKey]bool // of lash_nat, that the last Sweep found
	services *ServicePorts

	dryMu  sync.Mutex // one packet is tried at a time
	dry    *dryPrograms
	epochs epochs
}

// Open creates or reuses the pinned maps and programs. The caller's network
// namespace is the node's. Nothing is attached:
// what an earlier agent attached goes on forwarding until Attach replaces it.
func Open(cfg Config, log *slog.Logger) (*Datapath, error) {
	if cfg.SNATMin == 0 {
		cfg.SNATMin, cfg.SNATMax = 1024, 29999
	}
	if cfg.SNATMax < cfg.SNATMin {
		return nil, fmt.Errorf("masquerading ports %d-%d: the last is smaller than the first", cfg.SNATMin, cfg.SNATMax)
	}
	if cfg.SNATFarMax != 0 && cfg.SNATFarMax < cfg.SNATFarMin {
		return nil, fmt.Errorf("masquerading ports %d-%d: the last is smaller than the first", cfg.SNATFarMin, cfg.SNATFarMax)
	}
	d := &Datapath{cfg: cfg, log: log, maps: map[string]*ebpf.Map{}, programs: map[string]*ebpf.Program{}, kept: map[string]bool{},
		ifaces: map[uint32]bpf.Iface{}, departed: map[netip.Prefix]bool{}}
	for _, dir := range []string{d.mapDir(), d.linkDir(), d.programDir()} {
		if cfg.Root == "" {
			break
		}
		if err := os.MkdirAll(dir, 0o755); err != nil {
			return nil, fmt.Errorf("bpf-root %s: %w (is a bpffs mounted there?)", cfg.Root, err)
		}
	}
	d.features = Probe()
	if cfg.NoTCX {
		d.features.TCX = false
	}
	if cfg.HostRouting && !d.features.HostRouting() {
		return nil, errors.New("BPF host routing asked for, but this kernel lacks bpf_redirect_peer or bpf_redirect_neigh")
	}
	constants, err := d.constants()
	if err != nil {
		return nil, err
	}
	failed := d.load(constants)
	d.local, d.xdp = failed[localObject], failed[xdpObject] // a kernel may lack what they need; everything else works without
	delete(failed, localObject)
	delete(failed, xdpObject)
	if err := errors.Join(slices.Collect(maps.Values(failed))...); err != nil {
		d.Close()
		return nil, err
	}
	if err := errors.Join(d.begin(), d.spread(), d.unpinOtherPrograms()); err != nil {
		d.Close()
		return nil, err
	}
	return d, nil
}

// Close releases file descriptors. What is pinned and attached stays in the kernel.
func (d *Datapath) Close() error {
	d.closeDryRun()
	if d.epochs.settle() {
		if err := d.Raise("closing"); err != nil {
			d.log.Error("decisions of connections were not invalidated", "error", err)
		}
	}
	d.snat.close()
	for _, p := range d.programs {
		p.Close()
	}
	for _, m := range d.maps {
		m.Close()
	}
	return nil
}

// Program is a loaded program by name, for test runs. Nil: there is none.
func (d *Datapath) Program(name string) *ebpf.Program { return d.programs[name] }

// Map is a map by name, for tests that look at rows. Nil: there is none.
func (d *Datapath) Map(name string) *ebpf.Map { return d.maps[name] }

// Features are what this kernel was found to have.
func (d *Datapath) Features() Features { return d.features }

func (c Config) maglevSize() uint32 { return orDefault(c.MaglevSize, 16381) }

func (d *Datapath) mapDir() string  { return filepath.Join(d.cfg.Root, "maps") }
func (d *Datapath) linkDir() string { return filepath.Join(d.cfg.Root, "links") }

func (d *Datapath) constants() (*bpf.Constants, error) {
	hz, err := ticksPerSecond()
	if err != nil {
		return nil, err
	}
	netns, err := NetnsCookie()
	if err != nil {
		return nil, err
	}
	ticks := func(t time.Duration) uint32 { return uint32(t/time.Second) * hz }
	c := &bpf.Constants{
		HZ:             hz,
		CTTCPTicks:     ticks(lifetimeTCP),
		CTSYNTicks:     ticks(lifetimeSYN),
		CTCloseTicks:   ticks(lifetimeClose),
		CTAnyTicks:     ticks(cmp.Or(d.cfg.AnyLifetime, lifetimeAny)),
		HostIfindex:    uint32(d.cfg.HostIfindex),
		DirectIfindex:  uint32(d.cfg.DirectIfindex),
		OverlayIfindex: uint32(d.cfg.OverlayIfindex),
		TunnelPort:     uint32(d.cfg.TunnelPort),
		TunnelGeneve:   d.cfg.TunnelGeneve,
		HostRouting:    d.cfg.HostRouting,
		Masquerade4:    d.cfg.Masquerade4,
		Masquerade6:    d.cfg.Masquerade6,
		SNATMin:        uint32(d.cfg.SNATMin),
		SNATMax:        uint32(d.cfg.SNATMax),
		SNATFarMin:     uint32(d.cfg.SNATFarMin),
		SNATFarMax:     uint32(d.cfg.SNATFarMax),
		HaveSetRetval:  d.features.SetRetval,
		DSR:            d.cfg.DSR,
		DSRGeneve:      d.cfg.DSRGeneve,
		DSRPort:        uint32(d.cfg.DSRPort),
		TunnelMTU:      uint32(d.cfg.TunnelMTU),
		EventsWake:     eventsWake(eventsSize(runtime.NumCPU())),

		Services:           !d.cfg.NoServices,
		LBOutsideClusterIP: d.cfg.OutsideClusterIP,
		LBRefuse:           !d.cfg.DropNoBackend,
		XDPCPUs:            d.spreadCPUs(),
		MaglevSize:         d.cfg.maglevSize(),
		HostNetns:          netns,
		SockHostOnly:       d.cfg.SockHostOnly,
	}
	for _, a := range d.cfg.NodeAddrs {
		if a.Is4() {
			c.Node4 = bpf.AddrFrom(a)
		} else {
			c.Node6 = bpf.AddrFrom(a)
		}
	}
	for i, b := range d.cfg.HostMAC {
		c.HostMAC |= uint64(b) << (8 * i)
	}
	for _, r := range d.cfg.Routers {
		if r.Is4() {
			c.Router4 = bpf.AddrFrom(r)
		} else {
			c.Router6 = bpf.AddrFrom(r)
		}
	}
	for _, p := range d.cfg.NativeCIDRs {
		if p.Addr().Is4() {
			c.Native4Net, c.Native4Mask = bpf.PrefixFrom(p)
		} else {
			c.Native6Net, c.Native6Mask = bpf.PrefixFrom(p)
		}
	}
	var v4, v6 []netip.Prefix
	for _, p := range d.cfg.PodCIDRs {
		if p.Addr().Is4() {
			v4 = append(v4, p)
		} else {
			v6 = append(v6, p)
		}
	}
	if len(v4) == 1 {
		c.Pod4Net, c.Pod4Mask = bpf.PrefixFrom(v4[0])
	}
	if len(v6) == 1 {
		c.Pod6Net, c.Pod6Mask = bpf.PrefixFrom(v6[0])
	}
	return c, nil
}

// NetnsCookie is the kernel's number of the calling thread's network namespace.
func NetnsCookie() (uint64, error) {
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return 0, fmt.Errorf("cookie of the network namespace: %w", err)
	}
	defer unix.Close(fd)
	cookie, err := unix.GetsockoptUint64(fd, unix.SOL_SOCKET, unix.SO_NETNS_COOKIE)
	if err != nil {
		return 0, fmt.Errorf("cookie of the network namespace: %w", err)
	}
	return cookie, nil
}

// ticksPerSecond is CONFIG_HZ: the coarse clock advances once a tick.
func ticksPerSecond() (uint32, error) {
	var res unix.Timespec
	if err := unix.ClockGetres(unix.CLOCK_MONOTONIC_COARSE, &res); err != nil {
		return 0, fmt.Errorf("resolution of the coarse clock: %w", err)
	}
	return uint32((1e9 + res.Nano()/2) / res.Nano()), nil
}

// openMap reuses the pinned map if it is what the spec says, else replaces it.
func (d *Datapath) openMap(name string, spec *ebpf.MapSpec) (*ebpf.Map, error) {
	switch name {
	case "lash_conn":
		spec.MaxEntries = orDefault(d.cfg.ConnMax, spec.MaxEntries)
	case "lash_nat":
		spec.MaxEntries = orDefault(d.cfg.ConnMax/2, spec.MaxEntries)
	case "lash_services":
		spec.MaxEntries = orDefault(d.cfg.ServiceMax, spec.MaxEntries)
	case "lash_backends", "lash_members":
		spec.MaxEntries = orDefault(d.cfg.ServiceMax*4, spec.MaxEntries)
	case "lash_affinity", "lash_source_ranges", "lash_maglev":
		spec.MaxEntries = orDefault(d.cfg.ServiceMax, spec.MaxEntries)
	case "lash_xdp_cpus":
		spec.MaxEntries = uint32(ebpf.MustPossibleCPU())
	case "lash_events":
		spec.MaxEntries = eventsSize(runtime.NumCPU())
	}
	if d.cfg.Root == "" {
		return newMap(name, spec)
	}
	path := filepath.Join(d.mapDir(), name)
	m, err := ebpf.LoadPinnedMap(path, nil)
	if err == nil {
		if m.Type() == spec.Type && m.KeySize() == spec.KeySize && m.ValueSize() == spec.ValueSize && m.MaxEntries() == spec.MaxEntries {
			return m, nil
		}
		m.Close()
		d.log.Warn("map has another shape than this version's and starts empty", "map", name)
		if err := os.Remove(path); err != nil {
			return nil, fmt.Errorf("replace map %s: %w", name, err)
		}
	} else if !errors.Is(err, os.ErrNotExist) {
		return nil, fmt.Errorf("open map %s: %w", path, err)
	}
	if m, err = newMap(name, spec); err != nil {
		return nil, err
	}
	if err := m.Pin(path); err != nil {
		m.Close()
		return nil, fmt.Errorf("pin map %s: %w", path, err)
	}
	return m, nil
}

func newMap(name string, spec *ebpf.MapSpec) (*ebpf.Map, error) {
	m, err := ebpf.NewMap(spec)
	if err != nil {
		return nil, fmt.Errorf("create map %s (%d entries): %w", name, spec.MaxEntries, err)
	}
	return m, nil
}

func orDefault(v, def uint32) uint32 {
	if v == 0 {
		return def
	}
	return v
}

// begin makes what the maps hold agree with what this process remembers.
func (d *Datapath) begin() error {
	var ifindex uint32
	var iface bpf.Iface
	it := d.maps["lash_ifaces"].Iterate()
	for it.Next(&ifindex, &iface) {
		d.ifaces[ifindex] = iface
	}
	if err := it.Err(); err != nil {
		return fmt.Errorf("read lash_ifaces: %w", err)
	}
	if err := d.openSNATPorts(); err != nil {
		return err
	}
	if err := d.SetMonitoring(Monitoring{}); err != nil { // an earlier agent's listeners are gone
		return err
	}
	return d.Raise("agent started")
}

// changeRuntime changes the row that running programs read.
func (d *Datapath) changeRuntime(change func(*bpf.Runtime)) error {
	d.mu.Lock()
	defer d.mu.Unlock()
	var rt bpf.Runtime
	if err := d.maps["lash_runtime"].Lookup(uint32(0), &rt); err != nil {
		return err
	}
	change(&rt)
	return d.maps["lash_runtime"].Put(uint32(0), &rt)
}
