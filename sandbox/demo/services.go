// SPDX-License-Identifier: Apache-2.0

package demo

import (
	"context"
	_ "embed"
	"encoding/json"
	"errors"
	"fmt"
	"os/exec"
	"slices"
	"strings"
	"sync"
	"text/tabwriter"
	"time"

	"github.com/lash-net/lash/sandbox/cgroup"
	"github.com/lash-net/lash/sandbox/testbed"
)

//go:embed services.yaml
var servicesYAML string

const (
	replicas  = 6    // of the deployment that ends gracefully
	fullRate  = 2000 // requests a second during a rolling restart, of all paths that are loaded together
	quietRate = 50   // of each path, beside everything that happens to the agents

	graceful      = 12 * time.Second       // that its pods serve after they were told to end (services.yaml)
	agentsGone    = 10 * time.Second       // at least
	repinned      = time.Second            // after an agent is ready, until flows to backends that went meanwhile have others
	flowGap       = 2 * time.Second        // that a connection may have
	probeInterval = 20 * time.Millisecond  // between the messages of a flow
	answerTakes   = 100 * time.Millisecond // from one backend, while another's is awaited
	underWay      = 2                      // datagrams that may be lost when a flow gets another backend
)

// serviceStory is one story: while clients of every kind use services, backends are restarted, and agents are killed,
// taken away and upgraded. Requests must not notice.
type serviceStory struct {
	*resilience
	paths  []path
	flows  []serviceFlow
	loads  []*probe
	back   map[string]time.Time // when the agent of a node was ready after it had been away
	cabled map[string]bool      // nodes whose links have been made fit for XDP
	before []string             // chart values, of what has been changed since
	undo   []func() error       // of what clear is to undo besides, the last first

	graceful, abrupt map[string]loaded // by path: the rolling restarts
}

// serviceFlow is a connection, or a flow of datagrams, to a service.
type serviceFlow struct {
	*probe
	path      path
	datagrams bool
}

func checkServices(ctx context.Context, w *world, o Options) (passed, failed int) {
	s := &serviceStory{resilience: &resilience{world: w, o: o}, cabled: map[string]bool{}, back: map[string]time.Time{}, graceful: map[string]loaded{}, abrupt: map[string]loaded{}}
	// What was changed is undone also when this is interrupted, and named deeds tell when they are not.
	defer func() {
		if err := s.clear(context.WithoutCancel(ctx)); err != nil {
			s.report("everything undone", err)
		}
		passed, failed = s.passed, s.failed
	}()
	if err := s.prepare(ctx); err != nil {
		s.report("workloads for services", err)
		return s.passed, s.failed
	}
	for _, st := range s.steps() {
		s.run(ctx, st)
		if ctx.Err() != nil {
			s.report("services", errors.New("interrupted"))
			break
		}
	}
	s.summary()
	return s.passed, s.failed
}

// summary puts side by side what became of requests during rolling restarts.
func (s *serviceStory) summary() {
	table := tabwriter.NewWriter(s.o.Out, 0, 0, 2, ' ', 0)
	text := func(l loaded, ok bool) string {
		if !ok {
			return "not measured"
		}
		return fmt.Sprintf("%d failed of %d (%.0f/s)", l.Failed, l.Sent, l.rate())
	}
	fmt.Fprintln(table, "ROLLING RESTART UNDER LOAD\tSERVERS END GRACEFULLY\tSERVERS END AT ONCE")
	for _, p := range s.paths {
		g, gok := s.graceful[p.name]
		a, aok := s.abrupt[p.name]
		fmt.Fprintf(table, "%s\t%s\t%s\n", p.name, text(g, gok), text(a, aok))
	}
	table.Flush()
}

func (s *serviceStory) steps() []step {
	list := []step{
		{"XDP, best-effort: where cables take no frames tc serves, and the status says why", s.xdpFallsBack},
		{"XDP, best-effort: a cable that takes frames is used without a restart", s.xdpBegins},
	}
	for _, p := range s.paths {
		list = append(list, step{"rolling restart under load: " + p.name, func(ctx context.Context) error { return s.rollingRestart(ctx, fullRate, p) }})
	}
	return append(list,
		step{"rolling restart while the agents of all nodes are killed with -9", s.restartWhileKilled},
		step{"rolling restart of servers that end at once: requests fail, and are seen", s.abruptRestart},
		step{"all backends terminate: they serve new and kept connections until they end, then services refuse", s.terminateAll},
		step{"flows to services begin", s.startFlowsToServices},
		step{"agents of all nodes killed with -9, services in use", s.killAll},
		step{"agents absent: a backend is removed, another added, two end", s.changeBackends},
		step{"agents back, upgraded: backends that were removed meanwhile get no new connection", s.upgradeBack},
		step{"agents upgraded one after another, to XDP native on all nodes", s.upgradeAgain},
		step{"all of this: no request failed", s.endLoads},
		step{"all of this: connections and flows live", s.endFlows},
		step{"rolling restart under load: NodePort from outside, SNAT and DSR, XDP native on all nodes", s.restartNative},
		step{"all of this: nothing of what ended remains", s.leftovers},
		step{"malformed Services and EndpointSlices are reported as Events on them, and disturb no other", s.malformed},
	)
}

// prepare makes the workloads, finds the paths, and lets load generators have the CPU.
func (s *serviceStory) prepare(ctx context.Context) error {
	kpr, err := s.kubeProxyReplacement(ctx, "n1")
	if err != nil {
		return err
	}
	if _, err := s.c.KubectlInput(ctx, byDefault(servicesYAML, kpr.LBMode), "apply", "-f", "-"); err != nil {
		return err
	}
	for _, d := range []string{"deploy/graceful", "deploy/abrupt"} {
		if err := s.kubectl(ctx, "-n", "rolling", "rollout", "status", d, "--timeout=120s"); err != nil {
			return fmt.Errorf("%w\n%s", err, testbed.Overview(ctx, s.c))
		}
	}
	undo, err := s.c.Favour()
	if err != nil {
		return err
	}
	s.undo = append(s.undo, undo)
	s.o.Say("load generators have the CPU first: their cgroups, and the sandbox's on this machine, have %d times the usual share", cgroup.Favoured)
	s.paths, err = s.world.paths(ctx)
	return err
}

// byDefault takes the annotation off the services whose mode the cluster has anyway.
func byDefault(manifest, mode string) string {
	return strings.ReplaceAll(manifest, ", annotations: {service.lash.io/forwarding-mode: "+strings.ToLower(mode)+"}", "")
}

// clear takes away what the story made.
func (s *serviceStory) clear(ctx context.Context) error {
	for _, l := range s.loads {
		_, _ = endLoad(l, true)
	}
	for _, f := range s.flows {
		_, _ = f.stop()
	}
	ctx, cancel := context.WithTimeout(ctx, stepPatience)
	defer cancel()
	errs := []error{s.keepAgents(ctx)}
	if s.before != nil {
		errs = append(errs, s.upgrade(ctx, s.before...), s.rolledOut(ctx))
	}
	for _, undo := range slices.Backward(s.undo) {
		errs = append(errs, undo())
	}
	return errors.Join(append(errs,
		s.kubectl(ctx, "-n", "demo", "delete", "service/moving-snat", "service/moving-dsr", "--ignore-not-found", "--wait=false"),
		s.kubectl(ctx, "-n", "demo", "delete", "endpointslices", "-l", "kubernetes.io/service-name in (moving-snat,moving-dsr)", "--wait=false"),
		s.kubectl(ctx, "delete", "namespace", "rolling", "malformed", "--ignore-not-found", "--wait=false"))...)
}

// restart replaces all pods of a deployment and returns when those of before have ended. during is done when the first
// ones have been replaced; nil: nothing.
func (s *serviceStory) restart(ctx context.Context, app string, during func(context.Context) error) error {
	running := func(ctx context.Context) ([]string, error) { // names of those that have not been told to end
		out, err := s.c.Kubectl(ctx, "-n", "rolling", "get", "pods", "-l", "app="+app, "-o", `go-template={{range .items}}{{if not .metadata.deletionTimestamp}}{{.metadata.name}} {{end}}{{end}}`)
		return strings.Fields(out), err
	}
	before, err := running(ctx)
	if err != nil {
		return err
	}
	if err := s.kubectl(ctx, "-n", "rolling", "rollout", "restart", "deploy/"+app); err != nil {
		return err
	}
	if during != nil {
		if err := until(ctx, stepPatience, func(ctx context.Context) error {
			now, err := running(ctx)
			if err == nil && !slices.ContainsFunc(before, func(name string) bool { return !slices.Contains(now, name) }) {
				err = errors.New("no pod has been replaced yet")
			}
			return err
		}); err != nil {
			return err
		}
		if err := during(ctx); err != nil {
			return err
		}
	}
	if err := s.kubectl(ctx, "-n", "rolling", "rollout", "status", "deploy/"+app, "--timeout=90s"); err != nil {
		return err
	}
	return until(ctx, stepPatience, func(ctx context.Context) error {
		out, err := s.c.Kubectl(ctx, "-n", "rolling", "get", "pods", "-l", "app="+app, "--no-headers")
		if err == nil && strings.Contains(out, "Terminating") {
			err = fmt.Errorf("pods of before have not ended: %s", out)
		}
		return err
	})
}

// rollingRestart is one of the graceful servers while the paths are under load.
func (s *serviceStory) rollingRestart(ctx context.Context, rate int, paths ...path) error {
	before, err := s.xdpForwarded(ctx)
	if err != nil {
		return err
	}
	results, err := s.onPaths(ctx, paths, "graceful", rate, func(ctx context.Context) error { return s.restart(ctx, "graceful", nil) })
	for i, l := range results {
		p := paths[i]
		s.graceful[p.name] = l
		err = errors.Join(err, named(p.name, l.verdict(&s.diary)))
		if len(l.Servers) < 2*replicas {
			err = errors.Join(err, fmt.Errorf("%s: %d servers answered, want the %d of before and the %d new ones", p.name, len(l.Servers), replicas, replicas))
		}
	}
	if err != nil {
		return err
	}
	return s.xdpTookPart(ctx, before, paths, results)
}

func named(name string, err error) error {
	if err != nil {
		err = fmt.Errorf("%s: %w", name, err)
	}
	return err
}

// onPaths loads paths while do runs. Whether the generators kept up is told apart from what became of the requests.
func (s *serviceStory) onPaths(ctx context.Context, paths []path, service string, rate int, do func(context.Context) error) (results []loaded, err error) {
	var loads []*probe
	for _, p := range paths {
		l, lerr := s.startLoad(ctx, p, "rolling", service, rate, "-for", "5m")
		if err = lerr; err != nil {
			break
		}
		loads = append(loads, l)
	}
	if err == nil {
		err = do(ctx)
	}
	for i, l := range loads {
		r, lerr := endLoad(l, true)
		err = errors.Join(err, lerr)
		if lerr == nil {
			s.o.Say("%s: %s", paths[i].name, r)
			s.keptUp(paths[i].name, r, rate)
		}
		results = append(results, r)
	}
	return results, err
}

// keptUp reports a generator that did not: that is no failed request, and no success either.
func (s *serviceStory) keptUp(name string, l loaded, rate int) {
	if err := l.offered(rate); err != nil {
		s.report("the load generator kept up: "+name, err)
	}
}

func (s *serviceStory) restartWhileKilled(ctx context.Context) error {
	results, err := s.onPaths(ctx, s.paths, "graceful", fullRate/len(s.paths), func(ctx context.Context) error { return s.restart(ctx, "graceful", s.killAll) })
	for i, l := range results {
		err = errors.Join(err, named(s.paths[i].name, l.verdict(&s.diary)))
	}
	return err
}

// abruptRestart prints what graceful termination spares. That something fails proves that the generators see it.
func (s *serviceStory) abruptRestart(ctx context.Context) error {
	results, err := s.onPaths(ctx, s.paths, "abrupt", fullRate/len(s.paths), func(ctx context.Context) error { return s.restart(ctx, "abrupt", nil) })
	for i, l := range results {
		if s.abrupt[s.paths[i].name] = l; l.Failed == 0 {
			err = errors.Join(err, fmt.Errorf("%s: nothing failed, though servers ended with requests under way", s.paths[i].name))
		}
	}
	return err
}

// terminateAll takes all backends away. Kubernetes wants those that terminate to serve while nobody else is ready; when
// they have ended, services have no backend.
func (s *serviceStory) terminateAll(ctx context.Context) error {
	results, err := s.onPaths(ctx, s.paths, "graceful", quietRate, func(ctx context.Context) error {
		if err := s.kubectl(ctx, "-n", "rolling", "scale", "deploy/graceful", "--replicas=0"); err != nil {
			return err
		}
		if err := until(ctx, graceful/2, func(ctx context.Context) error {
			out, err := s.c.Kubectl(ctx, "-n", "rolling", "get", "endpointslices", "-l", "kubernetes.io/service-name=graceful-snat",
				"-o", "jsonpath={range .items[*].endpoints[*].conditions}{.ready},{.serving},{.terminating} {end}")
			if all := strings.Fields(out); err == nil && (len(all) == 0 || slices.ContainsFunc(all, func(c string) bool { return c != "false,true,true" })) {
				err = fmt.Errorf("ready, serving, terminating of the backends are %q, want false,true,true of all", all)
			}
			return err
		}); err != nil {
			return err
		}
		return pause(ctx, graceful/4)
	})
	for i, l := range results {
		err = errors.Join(err, named(s.paths[i].name, l.verdict(&s.diary)))
	}
	if err == nil {
		err = s.backendsEnded(ctx, 0)
	}
	if err == nil {
		err = until(ctx, patience, func(ctx context.Context) error { return s.refused(ctx) })
	}
	return errors.Join(err, s.scale(ctx, replicas))
}

// refused makes new connections to a service without backends, on all paths.
func (s *serviceStory) refused(ctx context.Context) error {
	return atOnce(len(s.paths), func(i int) error {
		load, err := s.startLoad(ctx, s.paths[i], "rolling", "graceful", 100, "-for", "1s", "-new", "100")
		if err != nil {
			return err
		}
		l, err := endLoad(load, false)
		if err == nil && (l.Failures["connect: refused"] != l.Sent) {
			err = fmt.Errorf("%s: no backend is left, and not all were refused at once: %s", s.paths[i].name, l)
		}
		return err
	})
}

// scale brings the graceful deployment to that many pods, Ready.
func (s *serviceStory) scale(ctx context.Context, n int) error {
	if err := s.kubectl(ctx, "-n", "rolling", "scale", "deploy/graceful", fmt.Sprintf("--replicas=%d", n)); err != nil {
		return err
	}
	return s.kubectl(ctx, "-n", "rolling", "rollout", "status", "deploy/graceful", "--timeout=90s")
}

// move makes the web pod of a node the only backend of the services moving-*. Their slices are written by hand: another
// label on a pod would be another identity, too.
func (s *serviceStory) move(ctx context.Context, node string) error {
	var slices []string
	for _, mode := range []string{"snat", "dsr"} {
		for _, f := range families {
			slices = append(slices, fmt.Sprintf(`apiVersion: discovery.k8s.io/v1
kind: EndpointSlice
metadata: {name: moving-%s-%s, namespace: demo, labels: {kubernetes.io/service-name: moving-%[1]s}}
addressType: IP%[2]s
ports: [{name: http, port: 8080, protocol: TCP}, {name: udp, port: 8081, protocol: UDP}]
endpoints: [{addresses: ["%[3]s"], nodeName: %[4]s}]
`, mode, f, s.web[node].addrs[f], node))
		}
	}
	_, err := s.c.KubectlInput(ctx, strings.Join(slices, "---\n"), "apply", "-f", "-")
	return err
}

// startFlowsToServices begins what must live through all that happens to agents: TCP connections to backends that stay,
// datagrams to one that will be removed, and requests.
func (s *serviceStory) startFlowsToServices(ctx context.Context) error {
	if err := s.move(ctx, "n2"); err != nil {
		return err
	}
	lasting := context.WithoutCancel(ctx) // they outlive the step; clear ends what no step has ended
	for _, p := range s.paths {
		if err := until(ctx, patience, func(ctx context.Context) error { return s.servedBy(ctx, p, "moving", s.web["n2"].name) }); err != nil {
			return err
		}
		steady, err := s.frontendsOf(ctx, "demo", "web-"+p.mode)
		if err != nil {
			return err
		}
		moving, err := s.frontendsOf(ctx, "demo", "moving-"+p.mode)
		if err != nil {
			return err
		}
		for _, f := range families {
			tcp, err := p.start(lasting, p.name+", "+f+", TCP", "probe", "-for", "1h", "-interval", probeInterval.String(), "-who", "tcp", p.to(steady, f, "tcp").String())
			if err != nil {
				return err
			}
			s.flows = append(s.flows, serviceFlow{tcp, p, false})
			udp, err := p.start(lasting, p.name+", "+f+", UDP", "probe", "-for", "1h", "-interval", probeInterval.String(), "-who", "-unconnected", "udp", p.to(moving, f, "udp").String())
			if err != nil {
				return err
			}
			s.flows = append(s.flows, serviceFlow{udp, p, true})
		}
		load, err := s.startLoad(lasting, p, "demo", "web", quietRate, "-for", "1h")
		if err != nil {
			return err
		}
		s.loads = append(s.loads, load)
	}
	return nil
}

// servedBy makes new connections to a service; all must be answered, and by that pod.
func (s *serviceStory) servedBy(ctx context.Context, p path, service, pod string) error {
	l, err := s.startLoad(ctx, p, "demo", service, 200, "-for", "1s", "-new", "100")
	if err != nil {
		return err
	}
	r, err := endLoad(l, false)
	if err != nil {
		return err
	}
	if r.Failed > 0 || r.Servers[pod] != r.Sent {
		return fmt.Errorf("%s, service %s: answered by %v, want %s: %s", p.name, service, r.Servers, pod, r)
	}
	return nil
}

// killAll kills the agents of all nodes and waits for those that the kubelets start.
func (s *serviceStory) killAll(ctx context.Context) error {
	before := map[string]string{}
	for _, n := range s.c.Nodes {
		pid, err := s.killAgent(ctx, n)
		if err != nil {
			return err
		}
		before[n] = pid
	}
	start := time.Now()
	for n, pid := range before {
		if err := s.waitAgent(ctx, n, pid); err != nil {
			return err
		}
	}
	s.o.Say("agents are ready %.1f s after they were killed", time.Since(start).Seconds())
	return nil
}

// hereLabel is on no node: agents that must have it run nowhere.
const hereLabel = "lash-sandbox/here"

func (s *serviceStory) keepAgents(ctx context.Context) error {
	return s.kubectl(ctx, "-n", "kube-system", "patch", "ds/lash", "--patch", `{"spec":{"template":{"spec":{"nodeSelector":{"`+hereLabel+`":null}}}}}`)
}

// changeBackends takes the agents away, replaces a backend that lives on by another, and lets two others end.
func (s *serviceStory) changeBackends(ctx context.Context) error {
	if err := s.kubectl(ctx, "-n", "kube-system", "patch", "ds/lash", "--patch", `{"spec":{"template":{"spec":{"nodeSelector":{"`+hereLabel+`":"yes"}}}}}`); err != nil {
		return err
	}
	if err := until(ctx, stepPatience, func(ctx context.Context) error {
		for _, n := range s.c.Nodes {
			if pid, err := s.agentPid(ctx, n); err == nil {
				return fmt.Errorf("an agent runs on %s: process %s", n, pid)
			}
		}
		return nil
	}); err != nil {
		return err
	}
	s.since = time.Now()
	if err := s.move(ctx, "n3"); err != nil {
		return err
	}
	if err := s.kubectl(ctx, "-n", "rolling", "scale", "deploy/graceful", fmt.Sprintf("--replicas=%d", replicas-2)); err != nil {
		return err
	}
	if err := s.backendsEnded(ctx, replicas-2); err != nil {
		return err
	}
	// The kernel still has the backend of before: otherwise nothing that follows would show anything.
	for _, p := range s.paths {
		if err := s.servedBy(ctx, p, "moving", s.web["n2"].name); err != nil {
			return err
		}
	}
	return pause(ctx, time.Until(s.since.Add(agentsGone)))
}

// backendsEnded waits until there are so many pods.
func (s *serviceStory) backendsEnded(ctx context.Context, want int) error {
	return until(ctx, stepPatience, func(ctx context.Context) error {
		out, err := s.c.Kubectl(ctx, "-n", "rolling", "get", "pods", "-l", "app=graceful", "--no-headers")
		if n := strings.Count(out, "\n"); err == nil && n != want {
			err = fmt.Errorf("%d pods, want %d:\n%s", n, want, out)
		}
		return err
	})
}

// upgrade changes chart values.
func (s *serviceStory) upgrade(ctx context.Context, values ...string) error {
	args := []string{"upgrade", "--kubeconfig", s.c.Kubeconfig(false), "--reuse-values"}
	for _, v := range values {
		args = append(args, "--set", v)
	}
	if out, err := exec.CommandContext(ctx, s.o.Lash, args...).CombinedOutput(); err != nil {
		return fmt.Errorf("lash %s: %w: %s", strings.Join(args, " "), err, out)
	}
	return nil
}

// upgradeBack lets agents with other programs start, and connects on each path from the moment that the agent is ready
// where its backends are chosen.
func (s *serviceStory) upgradeBack(ctx context.Context) error {
	if err := s.upgrade(ctx, "serviceNoBackendResponse=drop"); err != nil {
		return err
	}
	if err := s.keepAgents(ctx); err != nil {
		return err
	}
	var choosers []string
	for _, p := range s.paths {
		if !slices.Contains(choosers, p.node) {
			choosers = append(choosers, p.node)
		}
	}
	var mu sync.Mutex
	err := atOnce(len(choosers), func(i int) error {
		node := choosers[i]
		if err := s.waitAgent(ctx, node, ""); err != nil {
			return err
		}
		mu.Lock()
		s.back[node] = time.Now()
		mu.Unlock()
		var ofNode []path
		for _, p := range s.paths {
			if p.node == node {
				ofNode = append(ofNode, p)
			}
		}
		return atOnce(2*len(ofNode), func(i int) error {
			if i%2 == 0 {
				return s.servedBy(ctx, ofNode[i/2], "moving", s.web["n3"].name)
			}
			return s.livingServe(ctx, ofNode[i/2])
		})
	})
	return errors.Join(err, s.rolledOut(ctx))
}

// livingServe makes new connections to a service of which two backends have ended.
func (s *serviceStory) livingServe(ctx context.Context, p path) error {
	load, err := s.startLoad(ctx, p, "rolling", "graceful", 100, "-for", "1s", "-new", "100")
	if err != nil {
		return err
	}
	l, err := endLoad(load, false)
	if err == nil {
		err = named(p.name+", a service of which two backends have ended", l.verdict(&s.diary))
	}
	return err
}

// upgradeAgain does it to other programs once more; devices that tc served until then are served by XDP meanwhile.
func (s *serviceStory) upgradeAgain(ctx context.Context) error {
	for _, n := range s.c.Nodes {
		if err := s.cable(ctx, n); err != nil {
			return err
		}
	}
	if err := s.upgrade(ctx, "serviceNoBackendResponse=reject", "loadBalancer.acceleration=native"); err != nil {
		return err
	}
	if err := s.rolledOut(ctx); err != nil {
		return err
	}
	return s.accelerated(ctx, "Native", nil)
}

// restartNative is another rolling restart with all nodes' devices under XDP, by way of the node that had none before.
func (s *serviceStory) restartNative(ctx context.Context) error {
	if err := s.scale(ctx, replicas); err != nil {
		return err
	}
	var paths []path
	for _, p := range s.paths {
		if p.node == slowNode {
			p.name, p.xdp = p.name+", XDP native", true
			paths = append(paths, p)
		}
	}
	err := s.rollingRestart(ctx, fullRate/len(paths), paths...)
	s.paths = append(s.paths, paths...) // for the summary
	return err
}

func (s *serviceStory) endLoads(context.Context) error {
	var errs []error
	for _, p := range s.loads {
		l, err := endLoad(p, true)
		if err == nil {
			s.o.Say("%s: %s", p.name, l)
			s.keptUp("requests beside everything, "+p.name, l, quietRate)
			if err = l.verdict(&s.diary); err == nil && len(l.Servers) != nodes {
				err = fmt.Errorf("%d servers answered, want %d", len(l.Servers), nodes)
			}
		}
		if err != nil {
			errs = append(errs, fmt.Errorf("%s: %w", p.name, err))
		}
	}
	s.loads = nil
	return errors.Join(errs...)
}

// endFlows: connections have lost nothing, and datagrams have been answered by the new backend since shortly after the
// agents' return.
func (s *serviceStory) endFlows(ctx context.Context) error {
	before, after := s.web["n2"].name, s.web["n3"].name
	results, errs := make([]probeResult, len(s.flows)), make([]error, len(s.flows))
	behind := time.Duration(0) // the backend that went, when it went
	for i, f := range s.flows {
		results[i], errs[i] = f.stop()
		if f.datagrams { // connections go on with it
			behind = max(behind, time.Duration(results[i].Servers[before].BehindMS*float64(time.Millisecond)))
		}
	}
	s.o.Say("datagrams to another backend: the one before was %s behind with its answers, and lost with them is what it had not read", behind.Round(time.Millisecond))
	for i, f := range s.flows {
		r, err := results[i], errs[i]
		lost := r.Lost
		if f.datagrams && lost-max(underWayWith(r, after), unreadBy(r, after, behind)) <= underWay {
			r.Lost = 0
		}
		if err == nil {
			err = r.verdict(&s.diary)
		}
		if gap := time.Duration(r.MaxGapMS * float64(time.Millisecond)); err == nil && gap > flowGap {
			err = fmt.Errorf("silent for %s until %s (%s)", gap, r.MaxGapAt.Format("15:04:05.000"), s.diary.at(r.MaxGapAt))
		}
		if err == nil && f.datagrams {
			err = repinnedInTime(r, before, after, s.back[f.path.node])
		}
		if err == nil && !f.datagrams && len(r.Servers) != 1 {
			err = fmt.Errorf("one connection was answered by %v", r.Servers)
		}
		if errs[i] = nil; err != nil {
			errs[i] = fmt.Errorf("%s: %w", f.name, err)
			if f.datagrams {
				s.o.Say("%s: answered by %+v, %d times by a backend that was forgotten meanwhile, from %v on; the agent of %s was ready at %s and said:\n%s", f.name, r.Servers, r.Strays, r.FirstStray, f.path.node, s.back[f.path.node].Format("15:04:05.000"), s.forgot(ctx, f.path.node))
			}
			continue
		}
		s.o.Say("%s: %d messages, %d lost (%d answered by a backend that was forgotten meanwhile), %d not read in time, longest gap %.0f ms", f.name, r.Sent, lost, r.Strays, r.Overflowed, r.MaxGapMS)
	}
	s.flows = nil
	return errors.Join(errs...)
}

// forgot is what the agents of a node, this one and the one before, have written about services, with its time.
func (s *serviceStory) forgot(ctx context.Context, node string) string {
	out, _ := s.c.Exec(ctx, node, "sh", "-c", "grep -hE 'forgotten|ready|XDP' /var/log/pods/kube-system_lash-*/lash-agent/*.log | tail -30")
	return out
}

// underWayWith is how many of the lost datagrams the backend of before did answer, when the flow had another one already: its
// answers came, untranslated. On a busy machine that server may be kept waiting for long, and all that it had not read by
// then is lost. Answers that come like that before the flow has another backend are a fault of the node's.
func underWayWith(r probeResult, after string) int64 {
	if r.FirstStray == nil || r.FirstStray.Before(r.Servers[after].First.Add(-answerTakes)) {
		return 0
	}
	return min(r.Strays, r.Lost)
}

// unreadBy is how many of the lost datagrams the backend of before may not have read when the flow got another one, as it was
// that far behind: all, if they are of the time right before. Its answers came to a node that had forgotten it.
func unreadBy(r probeResult, after string, behind time.Duration) int64 {
	moved := r.Servers[after].FirstAsked
	if behind == 0 || r.FirstLost == nil || r.FirstLost.Before(moved.Add(-behind-underWay*probeInterval)) || r.LastLost.After(moved) {
		return 0
	}
	return r.Lost
}

// repinnedInTime: the backend that was removed is asked nothing more shortly after an agent knows, and the other one is, from
// then on. What counts is when a message was sent: its answer waits for its server.
func repinnedInTime(r probeResult, before, after string, known time.Time) error {
	b, a := r.Servers[before], r.Servers[after]
	late := b.LastAsked.Sub(known)
	switch {
	case b.Answers == 0 || a.Answers == 0 || len(r.Servers) != 2:
		return fmt.Errorf("answered by %v, want %s and then %s", r.Servers, before, after)
	case late > repinned:
		return fmt.Errorf("%s is still asked %s after the agent was ready, %s is the limit", before, late, repinned)
	case a.FirstAsked.Before(b.LastAsked):
		return fmt.Errorf("%s was asked at %s and %s once more at %s", after, a.FirstAsked, before, b.LastAsked)
	}
	return nil
}

// eventsOn are the texts of the Events on an object that say it is not served.
func (s *serviceStory) eventsOn(ctx context.Context, namespace string) (map[string][]string, error) {
	out, err := s.c.Kubectl(ctx, "-n", namespace, "get", "events", "--field-selector=reason=NotServed", "-o", "json")
	if err != nil {
		return nil, err
	}
	var list struct {
		Items []struct {
			InvolvedObject struct{ Kind, Name string }
			Message        string
		}
	}
	if err := json.Unmarshal([]byte(out), &list); err != nil {
		return nil, err
	}
	found := map[string][]string{}
	for _, e := range list.Items {
		on := e.InvolvedObject.Kind + " " + e.InvolvedObject.Name
		found[on] = append(found[on], e.Message)
	}
	return found, nil
}
