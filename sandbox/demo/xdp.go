// SPDX-License-Identifier: Apache-2.0

package demo

import (
	"context"
	"encoding/json"
	"fmt"
	"slices"
	"strconv"
	"strings"
)

// Clients outside reach services by way of a node whose device has XDP, and of one where tc does the work: both are of the
// same cluster, whose acceleration is best-effort.
const (
	xdpNode  = "n1"
	slowNode = "n2"
)

// kubeProxyReplacement is what `lash status` of a node says of services.
func (w *world) kubeProxyReplacement(ctx context.Context, node string) (kpr struct {
	LBMode, XDPAcceleration string
	NotAccelerated          map[string]string
}, err error) {
	out, err := w.lashOn(ctx, node, "status", "-o", "json")
	if err != nil {
		return kpr, err
	}
	status := struct{ KubeProxyReplacement any }{&kpr}
	if err := json.Unmarshal([]byte(out), &status); err != nil {
		return kpr, err
	}
	if kpr.LBMode == "" || kpr.XDPAcceleration == "" {
		return kpr, fmt.Errorf("lash status on %s does not say how clients outside are served: %s", node, out)
	}
	return kpr, nil
}

// xdpFallsBack: with devices on which XDP could not send, tc goes on.
func (s *serviceStory) xdpFallsBack(ctx context.Context) error {
	kpr, err := s.kubeProxyReplacement(ctx, "n1")
	if err != nil {
		return err
	}
	s.before = []string{"loadBalancer.acceleration=" + strings.ToLower(kpr.XDPAcceleration), "serviceNoBackendResponse=reject"}
	if err := s.upgrade(ctx, "loadBalancer.acceleration=best-effort"); err != nil {
		return err
	}
	if err := s.rolledOut(ctx); err != nil {
		return err
	}
	return s.accelerated(ctx, "Best-Effort", s.c.Nodes)
}

// xdpBegins makes the underlay of one node such that XDP can send on it, and waits until its agent has noticed.
func (s *serviceStory) xdpBegins(ctx context.Context) error {
	undo, err := s.c.SumChecksums(ctx)
	if err != nil {
		return err
	}
	s.undo = append(s.undo, undo)
	if err := s.cable(ctx, xdpNode); err != nil {
		return err
	}
	return s.accelerated(ctx, "Best-Effort", slices.DeleteFunc(slices.Clone(s.c.Nodes), func(n string) bool { return n == xdpNode }))
}

// cable makes the link of a node one on which XDP can send, once.
func (s *serviceStory) cable(ctx context.Context, node string) error {
	if s.cabled[node] {
		return nil
	}
	undo, err := s.c.Cable(ctx, node)
	if err != nil {
		return err
	}
	s.cabled[node] = true
	s.undo = append(s.undo, undo)
	return nil
}

// accelerated waits until every node's status has this word for its acceleration, with XDP on all devices but those of the
// nodes in slow, which say why.
func (s *serviceStory) accelerated(ctx context.Context, word string, slow []string) error {
	const why = "it is a veth device whose peer takes no frames"
	return until(ctx, patience, func(ctx context.Context) error {
		for _, n := range s.c.Nodes {
			kpr, err := s.kubeProxyReplacement(ctx, n)
			if err != nil {
				return err
			}
			programs, err := s.lashOn(ctx, n, "bpf", "net", "list")
			if err != nil {
				return err
			}
			attached, reason := strings.Contains(programs, "xdp_entry"), kpr.NotAccelerated["eth0"]
			switch {
			case kpr.XDPAcceleration != word:
				return fmt.Errorf("XDP acceleration of %s is %s, want %s", n, kpr.XDPAcceleration, word)
			case slices.Contains(slow, n) && (attached || !strings.HasPrefix(reason, why)):
				return fmt.Errorf("%s, whose cable takes no frames: XDP attached: %v, the status says why not: %q", n, attached, reason)
			case !slices.Contains(slow, n) && (!attached || reason != ""):
				return fmt.Errorf("%s, whose cable takes frames: XDP attached: %v, the status says why not: %q", n, attached, reason)
			}
		}
		return nil
	})
}

// xdpForwarded is how many packets XDP has forwarded, by node.
func (s *serviceStory) xdpForwarded(ctx context.Context) (map[string]int64, error) {
	forwarded := map[string]int64{}
	for _, n := range []string{xdpNode, slowNode} {
		out, err := s.lashOn(ctx, n, "bpf", "metrics", "list", "-o", "json")
		if err != nil {
			return nil, err
		}
		var t struct {
			Columns []string
			Rows    [][]string
		}
		if err := json.Unmarshal([]byte(out), &t); err != nil {
			return nil, err
		}
		reason, hook, packets := slices.Index(t.Columns, "REASON"), slices.Index(t.Columns, "HOOK"), slices.Index(t.Columns, "PACKETS")
		if reason < 0 || hook < 0 || packets < 0 {
			return nil, fmt.Errorf("lash bpf metrics list: no packets by hook: %s", out)
		}
		for _, row := range t.Rows {
			if row[hook] == "xdp" && row[reason] == "Success" {
				n64, err := strconv.ParseInt(row[packets], 10, 64)
				if err != nil {
					return nil, err
				}
				forwarded[n] += n64
			}
		}
	}
	return forwarded, nil
}

// xdpTookPart: XDP forwarded what it is there for, on paths that lead through it, and nothing on others. What backends on
// other nodes get by the tunnel is tc's.
func (s *serviceStory) xdpTookPart(ctx context.Context, before map[string]int64, paths []path, results []loaded) error {
	if !paths[0].nodePort {
		return nil
	}
	after, err := s.xdpForwarded(ctx)
	if err != nil {
		return err
	}
	var requests int64
	for _, l := range results {
		requests += l.Sent
	}
	node, xdp := paths[0].node, paths[0].xdp
	switch n := after[node] - before[node]; {
	case !xdp && n > 0:
		return fmt.Errorf("XDP on %s forwarded %d packets, and is not attached there", node, n)
	case xdp && s.o.Mode == "native" && n < requests/2:
		return fmt.Errorf("XDP on %s forwarded %d packets of %d requests, of which two thirds go to other nodes", node, n, requests)
	case xdp:
		s.o.Say("XDP on %s forwarded %d packets meanwhile", node, n)
	}
	return nil
}
