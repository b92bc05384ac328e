// SPDX-License-Identifier: Apache-2.0

package demo

import (
	"context"
	"embed"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
)

// The golden files are what ip(8) shows on every node and in every pod, in each mode, with names in the place of what
// differs: of the seeds' lines, with the devices' names and the second family, and with what golden_test.go tells of.
//
//go:embed testdata/*.golden
var goldenFiles embed.FS

// golden compares devices, addresses, routes and MTUs with the golden files, line by line.
func (w *world) golden(mode string) []check {
	var list []check
	for _, n := range w.c.Nodes {
		list = append(list,
			check{"ip addr and ip route on " + n + ", line by line", func(ctx context.Context) error {
				return w.compare(ctx, w.onNode(n), n, mode+"-node")
			}},
			check{"ip addr and ip route in a pod on " + n + ", line by line", func(ctx context.Context) error {
				return w.compare(ctx, w.inPod(w.client[n]), n, mode+"-pod")
			}})
	}
	return list
}

func (w *world) compare(ctx context.Context, run runner, node, name string) error {
	out, err := run(ctx, "sh", "-c", "ip addr; echo; ip -4 route; echo; ip -6 route")
	if err != nil {
		return err
	}
	names, err := w.names(ctx, node)
	if err != nil {
		return err
	}
	got := shape(out, names)
	if w.writeGolden != "" {
		return os.WriteFile(filepath.Join(w.writeGolden, name+".golden"), []byte(got), 0o644)
	}
	want, err := goldenFiles.ReadFile("testdata/" + name + ".golden")
	if err != nil {
		return err
	}
	return firstDifference(string(want), got)
}

// firstDifference names the first line that is not as wanted.
func firstDifference(want, got string) error {
	w, g := strings.Split(want, "\n"), strings.Split(got, "\n")
	for i := range max(len(w), len(g)) {
		line := func(l []string) string {
			if i < len(l) {
				return l[i]
			}
			return "(the end)"
		}
		if line(w) != line(g) {
			return fmt.Errorf("line %d is %q, want %q", i+1, line(g), line(w))
		}
	}
	return nil
}

// names are the addresses that have a name in golden files, seen from a node.
func (w *world) names(ctx context.Context, node string) (map[string]string, error) {
	cidrs, routers, _, err := w.ciliumNodes(ctx)
	if err != nil {
		return nil, err
	}
	names := map[string]string{}
	digit := func(a netip.Addr) string { return strings.TrimPrefix(family(a), "v") }
	for _, n := range w.c.Nodes {
		owner := "OTHER-"
		if n == node {
			owner = ""
		}
		for _, f := range families {
			names[nodeAddr(n, f).String()] = owner + "NODE" + strings.TrimPrefix(f, "v")
		}
		for _, a := range routers[n] {
			names[a.String()] = owner + "ROUTER" + digit(a)
		}
		for _, c := range cidrs[n] {
			names[c.String()] = owner + "CIDR" + digit(c.Addr())
		}
	}
	for _, f := range families {
		names[w.client[node].addrs[f].String()] = "POD" + strings.TrimPrefix(f, "v")
	}
	return names, nil
}

var (
	ofOneRun = []struct {
		find *regexp.Regexp
		name string
	}{
		{regexp.MustCompile(`(?m)^\d+: `), "N: "},
		{regexp.MustCompile(`@if\d+`), "@ifN"},
		{regexp.MustCompile(`\blxc[0-9a-f]{6,}\b`), "lxcENDPOINT"},
		{regexp.MustCompile(`link/ether \S+ brd ff:ff:ff:ff:ff:ff`), "link/ether MAC brd ff:ff:ff:ff:ff:ff"},
		{regexp.MustCompile(`link-netns(id)? \S+`), "link-netns NS"},
		{regexp.MustCompile(`\bfe80::[0-9a-f:]+/64\b`), "LINKLOCAL/64"},
		{regexp.MustCompile(`(?m) +$`), ""},
	}
	block           = regexp.MustCompile(`(?m)^N: (?:.*\n)(?: .*\n)*`)
	addressOrPrefix = regexp.MustCompile(`(?:[0-9a-f]*[.:])+[0-9a-f]*(?:/\d+)?`)
)

// shape puts names in the place of what differs between runs, nodes and pods; of several devices or routes that are then
// the same it keeps one.
func shape(out string, names map[string]string) string {
	out = addressOrPrefix.ReplaceAllStringFunc(out, func(s string) string {
		if name, ok := names[s]; ok {
			return name
		}
		a, bits, _ := strings.Cut(s, "/")
		if name, ok := names[a]; ok && bits != "" {
			return name + "/" + bits
		}
		return s
	})
	for _, r := range ofOneRun {
		out = r.find.ReplaceAllString(out, r.name)
	}
	devices, routes, _ := strings.Cut(out, "\n\n")
	parts := []string{strings.Join(once(block.FindAllString(devices+"\n", -1)), "")}
	for _, r := range strings.Split(routes, "\n\n") {
		parts = append(parts, strings.Join(once(strings.Split(strings.TrimSpace(r), "\n")), "\n")+"\n")
	}
	return strings.Join(parts, "\n")
}

// once is the list in order, each once: the order in which devices were made is an accident.
func once(list []string) []string { return slices.Compact(slices.Sorted(slices.Values(list))) }
