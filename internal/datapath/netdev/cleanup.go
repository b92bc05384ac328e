// SPDX-License-Identifier: Apache-2.0

package netdev

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// CleanupConfig is where on the node there may be something of ours besides devices and routes.
type CleanupConfig struct {
	// BPFRoot has our directory of pinned maps, programs and links, "lash", in it; usually /sys/fs/bpf.
	BPFRoot string
	// Paths are our files and directories outside of it, such as /var/run/lash; each is removed with its contents.
	Paths []string
	// Programs are the names of our programs: filters on devices of the node have no other mark.
	Programs []string
}

// Cleanup removes every device, route, filter, pinned object and file that is recognisably ours, and needs no memory
// for it. It goes on after a failure; a second call finds nothing to do. removed has one sentence each.
//
// Devices go first: pods lose their network instead of having one without policy for a moment.
func (h *Host) Cleanup(config CleanupConfig) (removed []string, err error) {
	nl, err := h.open()
	if err != nil {
		return nil, fmt.Errorf("netlink: %w", err)
	}
	defer nl.Close()
	var problems []error
	note := func(what string, err error) {
		if err != nil {
			problems = append(problems, fmt.Errorf("%s: %w", what, err))
			return
		}
		removed = append(removed, what)
	}
	if err := cleanupRoutes(nl, note); err != nil {
		problems = append(problems, err)
	}
	for family, ipv6 := range map[string]bool{"IPv4": false, "IPv6": true} {
		if changed, err := h.SetMasquerade(ipv6, nil, false); changed || err != nil {
			note("netfilter table "+netfilterTable+" ("+family+")", err)
		}
	}
	if err := cleanupLinks(nl, config.Programs, note); err != nil {
		problems = append(problems, err)
	}
	paths := config.Paths
	if config.BPFRoot != "" {
		paths = append([]string{filepath.Join(config.BPFRoot, "lash")}, paths...)
	}
	for _, path := range paths {
		if !filepath.IsAbs(path) || strings.Count(filepath.Clean(path), "/") < 2 {
			problems = append(problems, fmt.Errorf("remove %q: not an absolute path of at least two elements", path))
			continue
		}
		if _, err := os.Lstat(path); errors.Is(err, fs.ErrNotExist) {
			continue
		}
		note("path "+path, os.RemoveAll(path))
	}
	return removed, errors.Join(problems...)
}

func cleanupRoutes(nl *netlink.Handle, note func(string, error)) error {
	for protocol, table := range map[netlink.RouteProtocol]int{RouteProtocol: unix.RT_TABLE_MAIN, ServiceRouteProtocol: unix.RT_TABLE_LOCAL} {
		routes, err := ourRoutes(nl, protocol, table)
		if err != nil {
			return err
		}
		for _, route := range routes {
			err := nl.RouteDel(&route)
			if errors.Is(err, unix.ESRCH) {
				continue
			}
			note("route "+prefixOf(route.Dst).String(), err)
		}
	}
	return nil
}

func cleanupLinks(nl *netlink.Handle, programs []string, note func(string, error)) error {
	links, err := dump(nl.LinkList)
	if err != nil {
		return fmt.Errorf("list links: %w", err)
	}
	for _, link := range links {
		attrs := link.Attrs()
		if strings.HasPrefix(attrs.Alias, aliasPrefix) {
			err := nl.LinkDel(link)
			if isNotFound(err) { // the other half of a pair
				continue
			}
			note("device "+attrs.Name, err)
			continue
		}
		if err := cleanupFilters(nl, link, programs, note); err != nil {
			return err
		}
	}
	return nil
}

// cleanupFilters removes our programs from the clsact hooks of a device that stays. The hook itself stays, too: others
// may be using it, and empty it does nothing.
func cleanupFilters(nl *netlink.Handle, link netlink.Link, programs []string, note func(string, error)) error {
	for _, parent := range []uint32{netlink.HANDLE_MIN_INGRESS, netlink.HANDLE_MIN_EGRESS} {
		filters, err := dump(func() ([]netlink.Filter, error) { return nl.FilterList(link, parent) })
		if errors.Is(err, unix.EINVAL) || errors.Is(err, unix.ENOENT) || isNotFound(err) {
			continue // no such hook
		}
		if err != nil {
			return fmt.Errorf("filters of %s: %w", link.Attrs().Name, err)
		}
		for _, filter := range filters {
			if f, ok := filter.(*netlink.BpfFilter); ok && slices.Contains(programs, f.Name) {
				note(fmt.Sprintf("filter %s of %s", f.Name, link.Attrs().Name), nl.FilterDel(filter))
			}
		}
	}
	return nil
}
