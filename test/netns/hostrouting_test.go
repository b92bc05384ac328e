// SPDX-License-Identifier: Apache-2.0

package netns

import (
	"context"
	"fmt"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"regexp"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/lash-net/lash/internal/testutil"
)

// netfilter has the namespace's netfilter count what it forwards, and what it sees of pods at all; the counters by name.
func netfilter(t *testing.T, ns *os.File) func() map[string]int {
	t.Helper()
	if _, err := exec.LookPath("nft"); err != nil {
		t.Skip("needs nft (package nftables): it counts what netfilter sees")
	}
	rules := `
add table inet seen
add counter inet seen forward4
add counter inet seen forward6
add counter inet seen prerouting4
add counter inet seen prerouting6
add chain inet seen forward { type filter hook forward priority -400; }
add chain inet seen prerouting { type filter hook prerouting priority -400; }
add rule inet seen forward meta nfproto ipv4 counter name forward4
add rule inet seen forward meta nfproto ipv6 counter name forward6
add rule inet seen prerouting ip saddr 10.0.0.0/16 counter name prerouting4
add rule inet seen prerouting ip6 saddr fd00::/48 ip6 daddr != ff00::/8 counter name prerouting6
`
	if out, err := try(ns, "nft", rules); err != nil {
		t.Skipf("this kernel has no nf_tables: %v\n%s", err, out)
	}
	counter := regexp.MustCompile(`counter (\w+) \{\s+packets (\d+)`)
	return func() map[string]int {
		t.Helper()
		counts := map[string]int{}
		for _, m := range counter.FindAllStringSubmatch(testutil.In(t, ns, "nft", "list counters table inet seen"), -1) {
			counts[m[1]], _ = strconv.Atoi(m[2])
		}
		if len(counts) != 4 {
			t.Fatalf("counters are %v", counts)
		}
		return counts
	}
}

// Pods' packets to pods and to outside pass netfilter's FORWARD and PREROUTING on no node with BPF host routing, and do
// with legacy.
func TestNetfilterSeesNothingOfPods(t *testing.T) {
	for _, legacy := range []bool{false, true} {
		t.Run(fmt.Sprintf("legacy %v", legacy), func(t *testing.T) {
			c := newCluster(t, options{podsPerNode: 2, legacy: legacy})
			a, near, far := c.nodes[0].pods[0], c.nodes[0].pods[1], c.nodes[1].pods[0]
			counts := []func() map[string]int{netfilter(t, c.nodes[0].ns), netfilter(t, c.nodes[1].ns)}
			for _, to := range []struct {
				ns   *os.File
				addr netip.Addr
			}{{near.ns, near.ip4}, {near.ns, near.ip6}, {far.ns, far.ip4}, {far.ns, far.ip6}, {c.outside, addr(outside4)}, {c.outside, addr(outside6)}} {
				if _, err := exchange(a.ns, serve(t, to.ns, to.addr), 1<<20); err != nil {
					t.Fatalf("to %s: %v", to.addr, err)
				}
			}
			for i, count := range counts {
				for name, n := range count() {
					if legacy != (n > 0) {
						t.Errorf("node %d: %s counts %d packets", i+1, name, n)
					}
				}
			}
		})
	}
}

// processed is how often this machine's CPUs took a packet in, at whatever device: the first column of softnet_stat.
func processed() (total uint64, err error) {
	text, err := os.ReadFile("/proc/net/softnet_stat")
	if err != nil {
		return 0, err
	}
	for line := range strings.Lines(string(text)) {
		n, err := strconv.ParseUint(strings.Fields(line)[0], 16, 32)
		if err != nil {
			return 0, err
		}
		total += n
	}
	return total, nil
}

// A packet from pod to pod between nodes is taken in at the devices it cannot avoid and nowhere else: the pod's host
// side, the bridge's port, the node's eth0, the pod's eth0. The counter is the whole machine's: many packets, the least
// of a few rounds.
func TestSoftnetShowsNoExtraHop(t *testing.T) {
	const packets, devices = 30000, 4
	for _, legacy := range []bool{false, true} {
		t.Run(fmt.Sprintf("legacy %v", legacy), func(t *testing.T) {
			c := newCluster(t, options{podsPerNode: 1, legacy: legacy})
			a, far := c.nodes[0].pods[0], c.nodes[1].pods[0]
			for _, dst := range []netip.Addr{far.ip4, far.ip6} {
				at := netip.AddrPortFrom(dst, 7001)
				// Nobody reads: what does not fit the socket vanishes without an answer.
				if err := inNS(far.ns, func() error {
					l, err := net.ListenPacket("udp", at.String())
					if err == nil {
						t.Cleanup(func() { l.Close() })
					}
					return err
				}); err != nil {
					t.Fatal(err)
				}
				least := 1e9
				if err := inNS(a.ns, func() error {
					u, err := net.Dial("udp", at.String())
					if err != nil {
						return err
					}
					defer u.Close()
					for range 5 {
						before, err := processed()
						if err != nil {
							return err
						}
						for range packets {
							if _, err := u.Write([]byte("x")); err != nil {
								return err
							}
						}
						after, err := processed()
						if err != nil {
							return err
						}
						least = min(least, float64(after-before)/packets)
					}
					return nil
				}); err != nil {
					t.Fatal(err)
				}
				t.Logf("to %s: a packet was taken in %.2f times", dst, least)
				if extra := least > devices+0.5; extra != legacy || least < devices-0.1 {
					t.Errorf("to %s: a packet was taken in %.2f times, at %d devices", dst, least, devices)
				}
			}
		})
	}
}

// stream sends from a namespace until ctx ends, to a reader in another.
func stream(t *testing.T, ctx context.Context, from *os.File, to *os.File, at netip.AddrPort) {
	t.Helper()
	if err := inNS(to, func() error {
		l, err := net.Listen("tcp", at.String())
		if err != nil {
			return err
		}
		t.Cleanup(func() { l.Close() })
		go func() {
			conn, err := l.Accept()
			if err != nil {
				return
			}
			defer conn.Close()
			for buf := make([]byte, 64<<10); ; {
				if _, err := conn.Read(buf); err != nil {
					return
				}
			}
		}()
		return nil
	}); err != nil {
		t.Fatal(err)
	}
	if err := inNS(from, func() error {
		conn, err := (&net.Dialer{Timeout: 3 * time.Second}).Dial("tcp", at.String())
		if err != nil {
			return err
		}
		context.AfterFunc(ctx, func() { conn.Close() })
		go func() {
			for buf := make([]byte, 64<<10); ; {
				if _, err := conn.Write(buf); err != nil {
					return
				}
			}
		}()
		return nil
	}); err != nil {
		t.Fatal(err)
	}
}

// backlog is how many bytes wait at a device's queue.
func backlog(t *testing.T, ns *os.File, device string) int {
	t.Helper()
	out := testutil.In(t, ns, "tc", "-s", "qdisc", "show", "dev", device)
	m := regexp.MustCompile(`backlog (\d+)([KM]?)b`).FindStringSubmatch(out)
	if m == nil {
		t.Fatalf("no backlog in %s", out)
	}
	n, _ := strconv.Atoi(m[1])
	return n * map[string]int{"": 1, "K": 1 << 10, "M": 1 << 20}[m[2]]
}

// With BPF host routing a packet belongs to its socket until the node's device has sent it: TCP knows what waits there
// and adds no more. With legacy routing the stack has taken the packet from the socket, and the queue fills with what
// the receiver's window allows.
func TestSocketStaysWithThePacketToTheDevice(t *testing.T) {
	const bounded = 512 << 10 // bytes; TCP small queues allow a ms of the rate and at least two packets of up to 64 KiB: 150 KiB are seen, and 4 MiB without
	for _, legacy := range []bool{false, true} {
		t.Run(fmt.Sprintf("legacy %v", legacy), func(t *testing.T) {
			c := newCluster(t, options{podsPerNode: 1, legacy: legacy})
			n, far := c.nodes[0], c.nodes[1].pods[0]
			if out, err := try(n.ns, "tc", "qdisc", "add", "dev", "eth0", "root", "tbf", "rate", "40mbit", "burst", "64k", "limit", "20m"); err != nil {
				t.Skipf("this kernel has no tbf: %v\n%s", err, out)
			}
			// It does not leave slow start for a rising round trip time.
			testutil.In(t, n.pods[0].ns, "sh", "-c", "echo reno > /proc/sys/net/ipv4/tcp_congestion_control")
			for _, dst := range []netip.Addr{far.ip4, far.ip6} {
				ctx, stop := context.WithCancel(t.Context())
				stream(t, ctx, n.pods[0].ns, far.ns, netip.AddrPortFrom(dst, 7002))
				most := 0
				for begin := time.Now(); time.Since(begin) < 2*time.Second && (!legacy || most <= 2*bounded); {
					if b := backlog(t, n.ns, "eth0"); time.Since(begin) > time.Second/2 {
						most = max(most, b)
					}
				}
				stop()
				t.Logf("to %s: at most %d KiB waited at the device", dst, most>>10)
				switch {
				case most == 0:
					t.Errorf("to %s: the device was never busy", dst)
				case !legacy && most > bounded:
					t.Errorf("to %s: %d bytes waited at the device, want at most %d", dst, most, bounded)
				case legacy && most <= bounded:
					t.Errorf("to %s: only %d bytes waited at the device: this test tells nothing", dst, most)
				}
				for backlog(t, n.ns, "eth0") > 0 { // what the first stream left
				}
			}
		})
	}
}
