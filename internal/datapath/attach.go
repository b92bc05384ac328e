// SPDX-License-Identifier: Apache-2.0

package datapath

import (
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"slices"
	"sort"
	"strings"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/link"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/lash-net/lash/bpf"
)

func isNoDevice(err error) bool { return errors.Is(err, unix.ENODEV) }

// A hook is one program on one direction of a device.
type hook struct {
	program string
	attach  ebpf.AttachType
}

var (
	podHooks    = []hook{{"from_container", ebpf.AttachTCXIngress}}
	deviceHooks = []hook{{"from_netdev", ebpf.AttachTCXIngress}, {"to_netdev", ebpf.AttachTCXEgress}}
	hostHooks   = []hook{{"from_host", ebpf.AttachTCXEgress}}
	tunnelHooks = []hook{{"from_overlay", ebpf.AttachTCXIngress}}
	xdpHooks    = []hook{{"xdp_entry", ebpf.AttachXDP}}
)

// AttachPod attaches the pods' programs to the host side of a veth pair, or replaces
// those of another version. Nothing is verified: all pods share the loaded programs.
func (d *Datapath) AttachPod(ifindex int, name string) error {
	return d.attach(ifindex, name, podHooks)
}

// DetachPod removes what AttachPod attached. A device that is gone is no error.
func (d *Datapath) DetachPod(ifindex int, name string) error {
	return d.detach(ifindex, name, podHooks)
}

// AttachDevice does the same for a device towards the network.
func (d *Datapath) AttachDevice(ifindex int, name string) error {
	return d.attach(ifindex, name, deviceHooks)
}

// DetachDevice removes what AttachDevice attached.
func (d *Datapath) DetachDevice(ifindex int, name string) error {
	return d.detach(ifindex, name, deviceHooks)
}

// AttachHost does the same for lash_host.
func (d *Datapath) AttachHost(ifindex int, name string) error {
	return d.attach(ifindex, name, hostHooks)
}

// AttachOverlay does the same for the tunnel device.
func (d *Datapath) AttachOverlay(ifindex int, name string) error {
	return d.attach(ifindex, name, tunnelHooks)
}

// DetachOverlay removes what AttachOverlay attached.
func (d *Datapath) DetachOverlay(ifindex int, name string) error {
	return d.detach(ifindex, name, tunnelHooks)
}

func (d *Datapath) attach(ifindex int, name string, hooks []hook) error {
	for _, h := range hooks {
		var err error
		if d.features.TCX {
			err = d.attachTCX(ifindex, name, h)
		} else {
			err = d.attachClsact(ifindex, name, h)
		}
		if err != nil {
			return fmt.Errorf("attach %s to %s: %w", h.program, name, err)
		}
	}
	return d.unpinOthers(name, hooks)
}

// unpinOthers removes the links by which another version attached programs to a device that this one has not.
func (d *Datapath) unpinOthers(name string, hooks []hook) error {
	prefix := d.linkPath(name, "")
	pins, err := filepath.Glob(prefix + "*")
	if err != nil {
		return fmt.Errorf("links of %s: %w", name, err)
	}
	for _, pin := range pins {
		program := strings.TrimPrefix(pin, prefix)
		if program == xdpHooks[0].program {
			continue // see KeepXDP
		}
		if strings.Contains(program, "-") || slices.ContainsFunc(hooks, func(h hook) bool { return h.program == program }) {
			continue // with a dash: of a device whose name begins with this one's
		}
		if err := os.Remove(pin); err != nil && !errors.Is(err, os.ErrNotExist) {
			return fmt.Errorf("detach %s from %s: %w", program, name, err)
		}
	}
	return nil
}

func (d *Datapath) linkPath(name, program string) string {
	return filepath.Join(d.linkDir(), name+"-"+program)
}

func (d *Datapath) attachTCX(ifindex int, name string, h hook) error {
	path, prog := d.linkPath(name, h.program), d.programs[h.program]
	if l, err := link.LoadPinnedLink(path, nil); err == nil {
		defer l.Close()
		info, err := l.Info()
		if err == nil && info.TCX() != nil && int(info.TCX().Ifindex) == ifindex {
			if err := l.Update(prog); err == nil {
				return nil
			}
		}
		// Of a device of that name that is gone.
		if err := os.Remove(path); err != nil && !errors.Is(err, os.ErrNotExist) {
			return err
		}
	}
	l, err := link.AttachTCX(link.TCXOptions{Interface: ifindex, Program: prog, Attach: h.attach})
	if err != nil {
		return err
	}
	defer l.Close()
	return l.Pin(path)
}

// Filters are ours by this priority and by their names.
const clsactPriority = 76

func (d *Datapath) attachClsact(ifindex int, name string, h hook) error {
	qdisc := &netlink.GenericQdisc{
		QdiscAttrs: netlink.QdiscAttrs{LinkIndex: ifindex, Handle: netlink.MakeHandle(0xffff, 0), Parent: netlink.HANDLE_CLSACT},
		QdiscType:  "clsact",
	}
	if err := netlink.QdiscAdd(qdisc); err != nil && !errors.Is(err, unix.EEXIST) {
		return fmt.Errorf("clsact: %w", err)
	}
	return netlink.FilterReplace(d.filter(ifindex, h))
}

func (d *Datapath) filter(ifindex int, h hook) *netlink.BpfFilter {
	parent := uint32(netlink.HANDLE_MIN_INGRESS)
	if h.attach == ebpf.AttachTCXEgress {
		parent = netlink.HANDLE_MIN_EGRESS
	}
	f := &netlink.BpfFilter{
		FilterAttrs:  netlink.FilterAttrs{LinkIndex: ifindex, Parent: parent, Handle: 1, Protocol: unix.ETH_P_ALL, Priority: clsactPriority},
		Name:         h.program,
		DirectAction: true,
	}
	if p := d.programs[h.program]; p != nil {
		f.Fd = p.FD()
	}
	return f
}

func (d *Datapath) detach(ifindex int, name string, hooks []hook) error {
	var errs []error
	for _, h := range hooks {
		if d.features.TCX {
			// The last reference to the link is its pin.
			if err := os.Remove(d.linkPath(name, h.program)); err != nil && !errors.Is(err, os.ErrNotExist) {
				errs = append(errs, fmt.Errorf("detach %s from %s: %w", h.program, name, err))
			}
			continue
		}
		if err := netlink.FilterDel(d.filter(ifindex, h)); err != nil && !errors.Is(err, unix.ENODEV) && !errors.Is(err, unix.ENOENT) && !errors.Is(err, unix.EINVAL) {
			errs = append(errs, fmt.Errorf("detach %s from %s: %w", h.program, name, err))
		}
	}
	return errors.Join(errs...)
}

// Attached tells whether the pods' programs of this process are on the device.
func (d *Datapath) Attached(ifindex int, name string) error {
	for _, h := range podHooks {
		if !d.features.TCX {
			continue
		}
		l, err := link.LoadPinnedLink(d.linkPath(name, h.program), nil)
		if err != nil {
			return fmt.Errorf("%s is not attached to %s: %w", h.program, name, err)
		}
		info, err := l.Info()
		l.Close()
		if err != nil || info.TCX() == nil || int(info.TCX().Ifindex) != ifindex {
			return fmt.Errorf("%s is attached to a device that is gone, not to %s", h.program, name)
		}
	}
	return nil
}

var sockAttach = map[string]ebpf.AttachType{
	"connect4": ebpf.AttachCGroupInet4Connect, "connect6": ebpf.AttachCGroupInet6Connect,
	"sendmsg4": ebpf.AttachCGroupUDP4Sendmsg, "sendmsg6": ebpf.AttachCGroupUDP6Sendmsg,
	"recvmsg4": ebpf.AttachCGroupUDP4Recvmsg, "recvmsg6": ebpf.AttachCGroupUDP6Recvmsg,
	"getpeername4": ebpf.AttachCgroupInet4GetPeername, "getpeername6": ebpf.AttachCgroupInet6GetPeername,
	"bind4": ebpf.AttachCGroupInet4Bind, "bind6": ebpf.AttachCGroupInet6Bind,
	"sock_release": ebpf.AttachCgroupInetSockRelease,
}

// AttachCgroup attaches the sock programs to a cgroup2 directory: every process below it
// has services translated at its sockets.
func (d *Datapath) AttachCgroup(path string) error { return d.attachCgroup(path, sockAttach) }

func (d *Datapath) attachCgroup(path string, programs map[string]ebpf.AttachType) error {
	for name, attach := range programs {
		pin := filepath.Join(d.linkDir(), "cgroup-"+name)
		if l, err := link.LoadPinnedLink(pin, nil); err == nil {
			err := l.Update(d.programs[name])
			l.Close()
			if err == nil {
				continue
			}
			if err := os.Remove(pin); err != nil {
				return fmt.Errorf("attach %s to cgroup %s: %w", name, path, err)
			}
		}
		l, err := link.AttachCgroup(link.CgroupOptions{Path: path, Attach: attach, Program: d.programs[name]})
		if err != nil {
			return fmt.Errorf("attach %s to cgroup %s: %w", name, path, err)
		}
		err = l.Pin(pin)
		l.Close()
		if err != nil {
			return fmt.Errorf("pin %s of cgroup %s: %w", name, path, err)
		}
	}
	return nil
}

// DetachCgroup removes the sock programs, for kube-proxy-replacement switched off.
func (d *Datapath) DetachCgroup() error { return d.detachCgroup(sockAttach) }

func (d *Datapath) detachCgroup(programs map[string]ebpf.AttachType) error {
	var errs []error
	for name := range programs {
		if err := os.Remove(filepath.Join(d.linkDir(), "cgroup-"+name)); err != nil && !errors.Is(err, os.ErrNotExist) {
			errs = append(errs, err)
		}
	}
	return errors.Join(errs...)
}

// Attachments lists what is attached where: device, program, direction, kind, id, tag.
func (d *Datapath) Attachments() ([]string, [][]string, error) {
	columns := []string{"DEVICE", "IFINDEX", "PROGRAM", "DIRECTION", "ATTACH", "ID", "TAG", "JITED"}
	var rows [][]string
	entries, err := os.ReadDir(d.linkDir())
	if err != nil {
		return nil, nil, fmt.Errorf("links: %w", err)
	}
	for _, e := range entries {
		l, err := link.LoadPinnedLink(filepath.Join(d.linkDir(), e.Name()), nil)
		if err != nil {
			continue
		}
		info, err := l.Info()
		l.Close()
		if err != nil {
			continue
		}
		device, ifindex, direction, kind := "cgroup", "", "", "cgroup"
		program := e.Name()[strings.LastIndex(e.Name(), "-")+1:]
		if tcx := info.TCX(); tcx != nil {
			kind, ifindex = "tcx", fmt.Sprint(tcx.Ifindex)
			device = strings.TrimSuffix(e.Name(), "-"+program)
			if _, err := net.InterfaceByIndex(int(tcx.Ifindex)); err != nil {
				continue
			}
			direction = directionOf(program)
		}
		if xdp := info.XDP(); xdp != nil {
			kind, ifindex, direction = "xdp", fmt.Sprint(xdp.Ifindex), "ingress"
			device = strings.TrimSuffix(e.Name(), "-"+program)
			if _, err := net.InterfaceByIndex(int(xdp.Ifindex)); err != nil {
				continue
			}
		}
		id, tag, jited := programFacts(info.Program)
		rows = append(rows, []string{device, ifindex, program, direction, kind, id, tag, jited})
	}
	if !d.features.TCX {
		rows = append(rows, clsactRows()...)
	}
	sort.Slice(rows, func(i, j int) bool { return strings.Join(rows[i], " ") < strings.Join(rows[j], " ") })
	return columns, rows, nil
}

func directionOf(program string) string {
	for _, hooks := range [][]hook{podHooks, deviceHooks, hostHooks, tunnelHooks} {
		for _, h := range hooks {
			if h.program == program && h.attach == ebpf.AttachTCXEgress {
				return "egress"
			}
		}
	}
	return "ingress"
}

func programFacts(id ebpf.ProgramID) (string, string, string) {
	p, err := ebpf.NewProgramFromID(id)
	if err != nil {
		return fmt.Sprint(id), "", ""
	}
	defer p.Close()
	info, err := p.Info()
	if err != nil {
		return fmt.Sprint(id), "", ""
	}
	size, err := info.JitedSize()
	return fmt.Sprint(id), info.Tag, fmt.Sprint(err == nil && size > 0)
}

func clsactRows() [][]string {
	var rows [][]string
	links, err := netlink.LinkList()
	if err != nil {
		return nil
	}
	for _, l := range links {
		for _, parent := range []uint32{netlink.HANDLE_MIN_INGRESS, netlink.HANDLE_MIN_EGRESS} {
			filters, err := netlink.FilterList(l, parent)
			if err != nil {
				continue
			}
			for _, f := range filters {
				b, ok := f.(*netlink.BpfFilter)
				if !ok || b.Priority != clsactPriority || !known(b.Name) {
					continue
				}
				direction := "ingress"
				if parent == netlink.HANDLE_MIN_EGRESS {
					direction = "egress"
				}
				id, tag, jited := programFacts(ebpf.ProgramID(b.Id))
				rows = append(rows, []string{l.Attrs().Name, fmt.Sprint(l.Attrs().Index), b.Name, direction, "clsact", id, tag, jited})
			}
		}
	}
	return rows
}

func known(program string) bool {
	for _, names := range bpf.Programs {
		for _, n := range names {
			if n == program {
				return true
			}
		}
	}
	return false
}
