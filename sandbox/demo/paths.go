// SPDX-License-Identifier: Apache-2.0

package demo

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"net/netip"
	"os/exec"
	"slices"
	"strings"
	"syscall"
	"time"

	"github.com/lash-net/lash/sandbox/plan"
)

// path is a way from a client to a service.
type path struct {
	name     string
	mode     string                                                       // of the service: snat or dsr, which ends its name
	node     string                                                       // that chooses the backend
	nodePort bool                                                         // of the node; else the cluster IP
	xdp      bool                                                         // the node's device has XDP
	run      func(ctx context.Context, args ...string) (*exec.Cmd, error) // the toolbox, at the client
}

// paths are those through which services are reached: from a pod at the socket and packet by packet, and from outside,
// by way of a node with XDP and of one without.
func (w *world) paths(ctx context.Context) ([]path, error) {
	// Another pod than the one whose sockets are translated: the kernel gives both kinds of connections of one pod the same
	// ports now and then, and towards a backend they would be one.
	pids := map[string]string{}
	for _, p := range []pod{w.client["n1"], w.web["n1"]} {
		pid, err := w.c.Exec(ctx, "n1", "sh", "-c", "ctr -n k8s.io tasks ls | grep '^"+p.container+" ' | tr -s ' ' | cut -d' ' -f2")
		if pid = strings.TrimSpace(pid); err != nil || pid == "" {
			return nil, fmt.Errorf("find the process of pod %s: %w", p.name, err)
		}
		pids[p.name] = pid
	}
	toolbox := func(args []string) []string { return append([]string{w.c.Toolbox()}, args...) }
	inPod := func(ctx context.Context, args ...string) (*exec.Cmd, error) {
		return w.c.PodGeneratorCommand(ctx, "n1", pids[w.client["n1"].name], toolbox(args)...)
	}
	beside := func(ctx context.Context, args ...string) (*exec.Cmd, error) {
		return w.c.BesideGeneratorCommand(ctx, "n1", pids[w.web["n1"].name], toolbox(args)...)
	}
	outside := func(ctx context.Context, args ...string) (*exec.Cmd, error) {
		return w.c.GeneratorCommand(ctx, plan.Outside, toolbox(args)...)
	}
	return []path{
		{"ClusterIP at the socket", "snat", "n1", false, false, inPod},
		{"ClusterIP per packet", "snat", "n1", false, false, beside},
		{"NodePort from outside, SNAT", "snat", slowNode, true, false, outside},
		{"NodePort from outside, DSR", "dsr", slowNode, true, false, outside},
		{"NodePort from outside, SNAT, XDP", "snat", xdpNode, true, true, outside},
		{"NodePort from outside, DSR, XDP", "dsr", xdpNode, true, true, outside},
	}, nil
}

// frontends of a service.
type frontends struct {
	ips       map[string]netip.Addr // by family
	ports     map[string]uint16     // by name
	nodePorts map[string]uint16
}

func (w *world) frontendsOf(ctx context.Context, namespace, name string) (frontends, error) {
	f := frontends{map[string]netip.Addr{}, map[string]uint16{}, map[string]uint16{}}
	out, err := w.c.Kubectl(ctx, "-n", namespace, "get", "service", name, "-o", "json")
	if err != nil {
		return f, err
	}
	var svc struct {
		Spec struct {
			ClusterIPs []netip.Addr
			Ports      []struct {
				Name           string
				Port, NodePort uint16
			}
		}
	}
	if err := json.Unmarshal([]byte(out), &svc); err != nil {
		return f, err
	}
	for _, ip := range svc.Spec.ClusterIPs {
		f.ips[family(ip)] = ip
	}
	for _, p := range svc.Spec.Ports {
		f.ports[p.Name], f.nodePorts[p.Name] = p.Port, p.NodePort
	}
	return f, nil
}

// to is where the path's client finds a port of the service.
func (p path) to(f frontends, family, port string) netip.AddrPort {
	if p.nodePort {
		return netip.AddrPortFrom(nodeAddr(p.node, family), f.nodePorts[port])
	}
	return netip.AddrPortFrom(f.ips[family], f.ports[port])
}

// start starts a program of the toolbox at the path's client. This machine runs it: it needs no API server and no agent.
func (p path) start(ctx context.Context, name string, args ...string) (*probe, error) {
	cmd, err := p.run(ctx, args...)
	if err != nil {
		return nil, err
	}
	started := &probe{name: name, cmd: cmd}
	cmd.Stdout, cmd.Stderr = &started.stdout, &started.stderr
	return started, cmd.Start()
}

// loaded is what a load generator saw (toolbox load).
type loaded struct {
	Sent, Failed, Connections            int64
	Failures                             map[string]int64
	FirstFailure                         *failure
	Seconds, P50MS, P99MS, MaxMS, LateMS float64
	Servers                              map[string]int64
}

type failure struct {
	At              time.Time
	To, From, Error string
}

func (l loaded) String() string {
	s := fmt.Sprintf("%d sent (%.0f/s, %d connections, %d servers), %d failed, p50 %.1f ms, p99 %.1f ms, longest %.0f ms (of which the generator itself: p99 %.1f ms)",
		l.Sent, l.rate(), l.Connections, len(l.Servers), l.Failed, l.P50MS, l.P99MS, l.MaxMS, l.LateMS)
	for _, k := range slices.Sorted(maps.Keys(l.Failures)) {
		s += fmt.Sprintf("; %d %s", l.Failures[k], k)
	}
	return s
}

// rate is how many requests a second were sent.
func (l loaded) rate() float64 { return float64(l.Sent) / l.Seconds }

// verdict on a load during which nothing was to fail.
func (l loaded) verdict(d *diary) error {
	if l.Failed == 0 {
		return nil
	}
	f := l.FirstFailure
	return fmt.Errorf("%s; the first at %s (%s), %s to %s: %s", l, f.At.Format("15:04:05.000"), d.at(f.At), f.From, f.To, f.Error)
}

// offered says whether the generator kept up: if not, what it saw says less than it is to say, whatever became of the requests.
func (l loaded) offered(rate int) error {
	if l.rate() >= .95*float64(rate) {
		return nil
	}
	return fmt.Errorf("it sent %.0f requests a second and was to send %d: this machine had no CPU for it, though the sandbox is favoured; end what else runs here, and run this again", l.rate(), rate)
}

// startLoad sends requests to the port "http" of a service, both families in turn, until it is stopped or the time is over.
func (w *world) startLoad(ctx context.Context, p path, namespace, service string, rate int, flags ...string) (*probe, error) {
	f, err := w.frontendsOf(ctx, namespace, service+"-"+p.mode)
	if err != nil {
		return nil, err
	}
	args := append([]string{"load", "-rate", fmt.Sprint(rate)}, flags...)
	for _, fam := range families {
		args = append(args, fmt.Sprintf("http://%s/hostname", p.to(f, fam, "http")))
	}
	return p.start(ctx, p.name, args...)
}

// endLoad waits for a load's end, which stop brings about, and says what it saw.
func endLoad(p *probe, stop bool) (loaded, error) {
	var l loaded
	if stop {
		_ = p.cmd.Process.Signal(syscall.SIGTERM)
	}
	err := p.cmd.Wait()
	if json.Unmarshal(p.stdout.Bytes(), &l) != nil || l.Sent == 0 {
		return l, errors.Join(fmt.Errorf("%s: the load generator ended without a result: %s %s", p.name, p.stdout.String(), p.stderr.String()), err)
	}
	return l, nil
}
