// SPDX-License-Identifier: Apache-2.0

package datapath

import (
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"runtime"
	"slices"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/link"
	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netlink/nl"
	"golang.org/x/sys/unix"

	"github.com/lash-net/lash/bpf"
	"github.com/lash-net/lash/internal/datapath/netdev"
)

// xdpObject may fail to load: without it packets take the way through tc.
const xdpObject = "xdp"

// spreadQueue is how many frames may wait for a CPU.
const spreadQueue = 2048

// AttachXDP attaches the XDP program to a device by its driver, or replaces that of another version, and lets frames be
// sent out of the device if it takes them. Called again, it looks at the device anew. An error says why the device cannot;
// then nothing of ours is attached to it, and tc does all the work. Somebody else's program is left alone.
func (d *Datapath) AttachXDP(ifindex int, name string) error {
	err := d.attachXDP(ifindex, name)
	if err != nil {
		err = errors.Join(err, d.DetachXDP(ifindex, name))
	}
	return err
}

func (d *Datapath) attachXDP(ifindex int, name string) error {
	if d.xdp != nil {
		return fmt.Errorf("this kernel does not take the program: %w", d.xdp)
	}
	dev, err := netlink.LinkByIndex(ifindex)
	if err != nil {
		return err
	}
	if err := errors.Join(takesBack(dev), showsTags(dev)); err != nil {
		return err
	}
	if err := d.linkXDP(dev, name); err != nil {
		return err
	}
	// The program's presence may be what makes the device take frames, so it is asked afterwards.
	features, known := xdpFeatures(ifindex)
	takes := known && features&xdpTransmits != 0
	rows := d.maps["lash_xdp_devices"]
	for key, want := range map[uint32]bool{uint32(ifindex): takes, uint32(ifindex) | bpf.XDPBack: takes && dev.Type() == "veth"} {
		if want {
			err = rows.Put(key, uint32(ifindex))
		} else {
			err = remove(rows, key)
		}
		if err != nil {
			return fmt.Errorf("lash_xdp_devices: %w", err)
		}
	}
	return nil
}

func (d *Datapath) linkXDP(dev netlink.Link, name string) error {
	ifindex := dev.Attrs().Index
	path, prog := d.linkPath(name, xdpHooks[0].program), d.programs[xdpHooks[0].program]
	if l, err := link.LoadPinnedLink(path, nil); err == nil {
		defer l.Close()
		info, err := l.Info()
		if err == nil && info.XDP() != nil && int(info.XDP().Ifindex) == ifindex && (d.isProgram(prog, info.Program) || l.Update(prog) == nil) {
			return nil
		}
		// Of a device of that name that is gone.
		if err := os.Remove(path); err != nil && !errors.Is(err, os.ErrNotExist) {
			return err
		}
	}
	l, err := link.AttachXDP(link.XDPOptions{Program: prog, Interface: ifindex, Flags: link.XDPDriverMode})
	switch {
	case errors.Is(err, unix.EBUSY), errors.Is(err, unix.EEXIST):
		return foreignXDP(dev)
	case errors.Is(err, unix.EOPNOTSUPP):
		return fmt.Errorf("its driver (%s) has no native XDP", dev.Type())
	case err != nil:
		return fmt.Errorf("its driver (%s) does not take the program: %w", dev.Type(), err)
	}
	defer l.Close()
	return l.Pin(path)
}

// isProgram tells whether a program has that number. Replaced by itself, a device might pause.
func (d *Datapath) isProgram(p *ebpf.Program, id ebpf.ProgramID) bool {
	info, err := p.Info()
	if err != nil {
		return false
	}
	own, ok := info.ID()
	return ok && own == id
}

// DetachXDP removes what AttachXDP attached. A device that is gone is no error.
func (d *Datapath) DetachXDP(ifindex int, name string) error {
	err := os.Remove(d.linkPath(name, xdpHooks[0].program))
	if errors.Is(err, os.ErrNotExist) {
		err = nil
	}
	if err != nil {
		err = fmt.Errorf("detach %s from %s: %w", xdpHooks[0].program, name, err)
	}
	if d.xdp != nil {
		return err
	}
	rows := d.maps["lash_xdp_devices"]
	return errors.Join(err, remove(rows, uint32(ifindex)), remove(rows, uint32(ifindex)|bpf.XDPBack))
}

// KeepXDP detaches from all devices but these, names by ifindex, what AttachXDP attached, now or in an earlier agent.
func (d *Datapath) KeepXDP(devices map[int]string) error {
	keep := map[string]bool{}
	for _, name := range devices {
		keep[d.linkPath(name, xdpHooks[0].program)] = true
	}
	pins, err := filepath.Glob(d.linkPath("*", xdpHooks[0].program))
	errs := []error{err}
	for _, pin := range pins {
		if !keep[pin] {
			errs = append(errs, os.Remove(pin))
		}
	}
	if d.xdp != nil {
		return errors.Join(errs...)
	}
	rows := d.maps["lash_xdp_devices"]
	var gone []uint32
	errs = append(errs, list(rows, "lash_xdp_devices", func(key, _ uint32) {
		if _, ok := devices[int(key&^bpf.XDPBack)]; !ok {
			gone = append(gone, key)
		}
	}))
	for _, key := range gone {
		errs = append(errs, remove(rows, key))
	}
	return errors.Join(errs...)
}

// foreignXDP names who else has a program on the device.
func foreignXDP(dev netlink.Link) error {
	what := "an XDP program"
	if x := dev.Attrs().Xdp; x != nil && x.ProgId != 0 {
		what = fmt.Sprintf("an XDP program (id %d)", x.ProgId)
		if p, err := ebpf.NewProgramFromID(ebpf.ProgramID(x.ProgId)); err == nil {
			if info, err := p.Info(); err == nil {
				what = fmt.Sprintf("the XDP program %s (id %d)", info.Name, x.ProgId)
			}
			p.Close()
		}
	}
	return fmt.Errorf("it has %s of somebody else: take that off ('ip link set dev %s xdp off', or end who attached it)", what, dev.Attrs().Name)
}

// takesBack tells why what the program sends back out of the device would be lost: a veth device gives it to its peer,
// which throws it away unless it polls.
func takesBack(dev netlink.Link) error {
	if dev.Type() != "veth" {
		return nil
	}
	features, known := xdpFeatures(dev.Attrs().Index)
	switch {
	case !known:
		return errors.New("it is a veth device, and this kernel cannot tell whether its peer takes frames (6.3)")
	case features&xdpTransmits == 0:
		return errors.New("it is a veth device whose peer takes no frames: that needs an XDP program (which may pass everything) and GRO off, and who sends to it transmit checksums off")
	}
	return nil
}

// showsTags tells why the program would take packets of another network for its own: it reads tags in frames only.
func showsTags(dev netlink.Link) error {
	links, err := netlink.LinkList()
	if err != nil {
		return fmt.Errorf("devices: %w", err)
	}
	i := slices.IndexFunc(links, func(l netlink.Link) bool { return l.Type() == "vlan" && l.Attrs().ParentIndex == dev.Attrs().Index })
	if i < 0 {
		return nil
	}
	const stripsTags = 1 << 8 // ETH_FLAG_RXVLAN of the UAPI
	if flags, err := netdev.Ethtool(dev.Attrs().Name, unix.ETHTOOL_GFLAGS, 0); err != nil {
		return fmt.Errorf("whether it strips VLAN tags: %w", err)
	} else if flags&stripsTags == 0 {
		return nil
	}
	return fmt.Errorf("it has VLAN devices (%s) and strips tags before XDP sees a frame: switch that off ('ethtool -K %s rxvlan off')", links[i].Attrs().Name, dev.Attrs().Name)
}

// Of enum netdev_xdp_act of the UAPI: the device takes frames that a program on another device redirects to it.
const xdpTransmits = 4

// xdpFeatures are what the kernel says that the device can; known: it says so (6.3).
func xdpFeatures(ifindex int) (features uint64, known bool) {
	// Of the UAPI's <linux/netdev.h>.
	const (
		devGet      = 1
		attrIfindex = 1
		attrXDP     = 3
		header      = 4 // struct genlmsghdr
	)
	family, err := netlink.GenlFamilyGet("netdev")
	if err != nil {
		return 0, false
	}
	req := nl.NewNetlinkRequest(int(family.ID), 0)
	// Not nl.Genlmsg: it sends two bytes more than it has, which the kernel wants to be 0.
	req.AddRawData(append([]byte{devGet, 1, 0, 0}, nl.NewRtAttr(attrIfindex, nl.Uint32Attr(uint32(ifindex))).Serialize()...))
	answers, err := req.Execute(unix.NETLINK_GENERIC, 0)
	if err != nil || len(answers) == 0 || len(answers[0]) < header {
		return 0, false
	}
	attrs, err := nl.ParseRouteAttrAsMap(answers[0][header:])
	if err != nil || len(attrs[attrXDP].Value) < 8 {
		return 0, false
	}
	return binary.NativeEndian.Uint64(attrs[attrXDP].Value), true
}

// spreadCPUs is the number of CPUs over which XDP spreads what it passes to the kernel; 0: it does not.
func (d *Datapath) spreadCPUs() uint32 {
	if !d.cfg.XDPSpread {
		return 0
	}
	return uint32(runtime.NumCPU())
}

// spread gives CPUs their queues, or takes them away.
func (d *Datapath) spread() error {
	if d.xdp != nil {
		return nil
	}
	rows := d.maps["lash_xdp_cpus"]
	for cpu := range rows.MaxEntries() {
		var err error
		var queue uint32
		if cpu < d.spreadCPUs() {
			if rows.Lookup(cpu, &queue) == nil && queue == spreadQueue {
				continue // written again it would be a new queue
			}
			if err = rows.Put(cpu, uint32(spreadQueue)); errors.Is(err, unix.ENODEV) {
				err = nil // a gap in the numbers: its packets stay where they are
			}
		} else {
			err = remove(rows, cpu)
		}
		if err != nil {
			return fmt.Errorf("queue of CPU %d: %w", cpu, err)
		}
	}
	return nil
}
