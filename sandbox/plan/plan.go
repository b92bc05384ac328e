// SPDX-License-Identifier: Apache-2.0

// Package plan owns every name and address of a sandbox: which network namespaces it has, which
// addresses live in them and which ranges pods and services get. It touches nothing.
//
// Each sandbox has an underlay of its own (a bridge in a namespace of its own), so all of them use
// the same addresses without meeting; only names differ.
package plan

import (
	"fmt"
	"net/netip"
	"regexp"
	"strconv"
	"strings"
)

// The hosts of every sandbox that are not nodes.
const (
	Switch       = "sw"      // the underlay bridge and default gateway
	ControlPlane = "cp"      // etcd, API server, controller manager, scheduler
	Outside      = "outside" // a machine that knows nothing about pods
)

// Ranges and addresses; v4 and v6 mirror each other digit by digit.
var (
	Underlay4 = netip.MustParsePrefix("172.18.0.0/16")
	Underlay6 = netip.MustParsePrefix("fd00:172:18::/64")

	Gateway4      = netip.MustParseAddr("172.18.0.1")
	Gateway6      = netip.MustParseAddr("fd00:172:18::1")
	ControlPlane4 = netip.MustParseAddr("172.18.0.2")
	ControlPlane6 = netip.MustParseAddr("fd00:172:18::2")
	Outside4      = netip.MustParseAddr("172.18.0.200")
	Outside6      = netip.MustParseAddr("fd00:172:18::200")

	// The outside host's second addresses lie behind the default gateway, which forwards only them.
	Beyond4 = netip.MustParsePrefix("203.0.113.200/32")
	Beyond6 = netip.MustParsePrefix("2001:db8::200/128")

	// Pod ranges that the controller manager hands out (ipam mode kubernetes).
	Pods4     = netip.MustParsePrefix("10.244.0.0/16")
	Pods6     = netip.MustParsePrefix("fd00:10:244::/56")
	PodMask4  = 24
	PodMask6  = 64
	Services4 = netip.MustParsePrefix("10.96.0.0/16")
	Services6 = netip.MustParsePrefix("fd00:10:96::/112")

	APIService4 = netip.MustParseAddr("10.96.0.1")
	DNS4        = netip.MustParseAddr("10.96.0.10")
	DNS6        = netip.MustParseAddr("fd00:10:96::a")
)

// APIPort is where the API server listens in the control plane's namespace.
const APIPort = 6443

// MaxNodes bounds node numbers, so that node addresses never reach Outside4.
const MaxNodes = 150

var (
	nameRE = regexp.MustCompile(`^[a-z0-9]([a-z0-9-]{0,18}[a-z0-9])?$`)
	hostRE = regexp.MustCompile(`^(sw|cp|outside|n[1-9][0-9]{0,2})$`)
)

// CheckName says what is wrong with a sandbox's name.
func CheckName(name string) error {
	if !nameRE.MatchString(name) {
		return fmt.Errorf("sandbox name %q: use 1 to 20 of a-z, 0-9 and '-', beginning and ending with a letter or digit", name)
	}
	return nil
}

// Netns is the name of the network namespace of one host of a sandbox.
func Netns(sandbox, host string) string { return "sb-" + sandbox + "-" + host }

// ParseNetns is the inverse of Netns; ok is false for names that are nobody's.
// Host names have no '-', so a name belongs to at most one sandbox.
func ParseNetns(ns string) (sandbox, host string, ok bool) {
	rest, found := strings.CutPrefix(ns, "sb-")
	i := strings.LastIndexByte(rest, '-')
	if !found || i < 1 {
		return "", "", false
	}
	sandbox, host = rest[:i], rest[i+1:]
	return sandbox, host, nameRE.MatchString(sandbox) && hostRE.MatchString(host)
}

// NodeName is the name of node number i, counted from 1.
func NodeName(i int) string { return "n" + strconv.Itoa(i) }

// NodeIndex is the number in a node's name.
func NodeIndex(name string) (int, error) {
	s, ok := strings.CutPrefix(name, "n")
	i, err := strconv.Atoi(s)
	if !ok || err != nil || i < 1 || i > MaxNodes || NodeName(i) != name {
		return 0, fmt.Errorf("%q is not a node name (n1 ... n%d)", name, MaxNodes)
	}
	return i, nil
}

// Zone of node number i: there are three, taken in turn.
func Zone(i int) string { return "zone-" + strconv.Itoa((i-1)%3+1) }

// NodeAddrs are the underlay addresses of node number i.
func NodeAddrs(i int) (v4, v6 netip.Addr) {
	return netip.AddrFrom4([4]byte{172, 18, 0, byte(10 + i)}),
		netip.MustParseAddr("fd00:172:18::" + strconv.Itoa(10+i))
}
