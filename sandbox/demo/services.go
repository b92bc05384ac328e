// SPDX-License-Identifier: Apache-2.0

package demo

import (
	"context"
	_ "embed"
	"encoding/json"
	"errors"
	"fmt"
	"os/exec"
	"strings"
	"time"

	"github.com/lash-net/lash/sandbox/testbed"
)

//go:embed services.yaml
var servicesYAML string

const (
	replicas   = 6    // of the deployment that ends gracefully
	fullRate   = 2000 // requests a second during a rolling restart
	sharedRate = 500  // of each path, where all are loaded at once
	quietRate  = 50   // of each path, beside everything that happens to the agents

	agentsGone = 10 * time.Second // at least
	repinned   = time.Second      // after an agent is ready, until flows to backends that went meanwhile have others
	flowGap    = 2 * time.Second  // that a connection may have
	underWay   = 2                // datagrams that may be lost when a flow gets another backend
)

// serviceStory is one story: while clients of every kind use services, backends are restarted, and agents are killed,
// taken away and upgraded. Requests must not notice.
type serviceStory struct {
	*resilience
	paths []path
	flows []serviceFlow
	loads []*probe
	// When the agent of n1 was ready after it had been away.
	back time.Time
}

// serviceFlow is a connection, or a flow of datagrams, to a service.
type serviceFlow struct {
	*probe
	datagrams bool
}

func checkServices(ctx context.Context, w *world, o Options) (passed, failed int) {
	s := &serviceStory{resilience: &resilience{world: w, o: o}}
	defer s.clear(context.WithoutCancel(ctx))
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
	return s.passed, s.failed
}

func (s *serviceStory) steps() []step {
	var list []step
	for _, p := range s.paths {
		list = append(list, step{"rolling restart under load: " + p.name, func(ctx context.Context) error { return s.rollingRestart(ctx, p) }})
	}
	return append(list,
		step{"rolling restart while the agents of all nodes are killed with -9", s.restartWhileKilled},
		step{"rolling restart of servers that end at once: requests fail, and are seen", s.abruptRestart},
		step{"flows to services begin", s.startFlowsToServices},
		step{"agents of all nodes killed with -9, services in use", s.killAll},
		step{"agents absent: a backend is removed, another added, two end", s.changeBackends},
		step{"agents back, upgraded: backends that were removed meanwhile get no new connection", s.upgradeBack},
		step{"agents upgraded one after another", s.upgradeAgain},
		step{"all of this: no request failed", s.endLoads},
		step{"all of this: connections and flows live", s.endFlows},
		step{"all of this: nothing of what ended remains", s.leftovers},
		step{"malformed Services and EndpointSlices are reported as Events on them, and disturb no other", s.malformed},
	)
}

// prepare makes the workloads and finds the paths.
func (s *serviceStory) prepare(ctx context.Context) (err error) {
	if _, err := s.c.KubectlInput(ctx, servicesYAML, "apply", "-f", "-"); err != nil {
		return err
	}
	for _, d := range []string{"deploy/graceful", "deploy/abrupt"} {
		if err := s.kubectl(ctx, "-n", "rolling", "rollout", "status", d, "--timeout=120s"); err != nil {
			return fmt.Errorf("%w\n%s", err, testbed.Overview(ctx, s.c))
		}
	}
	s.paths, err = s.world.paths(ctx)
	return err
}

// clear takes away what the story made.
func (s *serviceStory) clear(ctx context.Context) {
	for _, l := range s.loads {
		_, _ = endLoad(l, true)
	}
	for _, f := range s.flows {
		_, _ = f.stop()
	}
	ctx, cancel := context.WithTimeout(ctx, stepPatience)
	defer cancel()
	_ = s.keepAgents(ctx)
	_ = s.kubectl(ctx, "-n", "demo", "delete", "service/moving-snat", "service/moving-dsr", "--ignore-not-found", "--wait=false")
	_ = s.kubectl(ctx, "-n", "demo", "delete", "endpointslices", "-l", "kubernetes.io/service-name in (moving-snat,moving-dsr)", "--wait=false")
	_ = s.kubectl(ctx, "delete", "namespace", "rolling", "malformed", "--ignore-not-found", "--wait=false")
}

// restart replaces all pods of a deployment and returns when those of before have ended. during is done when the first
// ones have been replaced; nil: nothing.
func (s *serviceStory) restart(ctx context.Context, app string, during func(context.Context) error) error {
	if err := s.kubectl(ctx, "-n", "rolling", "rollout", "restart", "deploy/"+app); err != nil {
		return err
	}
	if during != nil {
		if err := until(ctx, stepPatience, func(ctx context.Context) error {
			out, err := s.c.Kubectl(ctx, "-n", "rolling", "get", "pods", "-l", "app="+app, "--no-headers")
			if err == nil && !strings.Contains(out, "Terminating") {
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

// rollingRestart is one of the graceful servers while the path is under full load.
func (s *serviceStory) rollingRestart(ctx context.Context, p path) error {
	load, err := s.startLoad(ctx, p, "rolling", "graceful", fullRate, "-for", "5m")
	if err != nil {
		return err
	}
	err = s.restart(ctx, "graceful", nil)
	l, lerr := endLoad(load, true)
	if err = errors.Join(err, lerr); err != nil {
		return err
	}
	s.o.Say("%s: %s", p.name, l)
	if len(l.Servers) < 2*replicas {
		return fmt.Errorf("%d servers answered, want the %d of before and the %d new ones", len(l.Servers), replicas, replicas)
	}
	return l.verdict(fullRate, &s.diary)
}

// onAllPaths loads all paths while do runs.
func (s *serviceStory) onAllPaths(ctx context.Context, service string, do func(context.Context) error) (results []loaded, err error) {
	var loads []*probe
	for _, p := range s.paths {
		l, lerr := s.startLoad(ctx, p, "rolling", service, sharedRate, "-for", "5m")
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
			s.o.Say("%s: %s", s.paths[i].name, r)
		}
		results = append(results, r)
	}
	return results, err
}

func (s *serviceStory) restartWhileKilled(ctx context.Context) error {
	results, err := s.onAllPaths(ctx, "graceful", func(ctx context.Context) error { return s.restart(ctx, "graceful", s.killAll) })
	for i, l := range results {
		if verr := l.verdict(sharedRate, &s.diary); err == nil && verr != nil {
			return fmt.Errorf("%s: %w", s.paths[i].name, verr)
		}
	}
	return err
}

// abruptRestart prints what graceful termination spares. That something fails proves that the generators see it.
func (s *serviceStory) abruptRestart(ctx context.Context) error {
	results, err := s.onAllPaths(ctx, "abrupt", func(ctx context.Context) error { return s.restart(ctx, "abrupt", nil) })
	if err != nil {
		return err
	}
	for i, l := range results {
		if l.Failed == 0 {
			return fmt.Errorf("%s: nothing failed, though servers ended with requests under way", s.paths[i].name)
		}
	}
	return nil
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
			tcp, err := p.start(lasting, p.name+", "+f+", TCP", "probe", "-for", "1h", "-interval", "20ms", "-who", "tcp", p.to(steady, f, "tcp").String())
			if err != nil {
				return err
			}
			udp, err := p.start(lasting, p.name+", "+f+", UDP", "probe", "-for", "1h", "-interval", "20ms", "-who", "-unconnected", "udp", p.to(moving, f, "udp").String())
			if err != nil {
				return err
			}
			s.flows = append(s.flows, serviceFlow{tcp, false}, serviceFlow{udp, true})
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
	if err := s.backendsEnded(ctx); err != nil {
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

// backendsEnded waits until the pods that were to end have ended.
func (s *serviceStory) backendsEnded(ctx context.Context) error {
	return until(ctx, stepPatience, func(ctx context.Context) error {
		out, err := s.c.Kubectl(ctx, "-n", "rolling", "get", "pods", "-l", "app=graceful", "--no-headers")
		if n := strings.Count(out, "\n"); err == nil && n != replicas-2 {
			err = fmt.Errorf("%d pods, want %d:\n%s", n, replicas-2, out)
		}
		return err
	})
}

// upgrade changes a value that the programs are loaded with.
func (s *serviceStory) upgrade(ctx context.Context, value string) error {
	args := []string{"upgrade", "--kubeconfig", s.c.Kubeconfig(false), "--reuse-values", "--set", value}
	if out, err := exec.CommandContext(ctx, s.o.Lash, args...).CombinedOutput(); err != nil {
		return fmt.Errorf("lash %s: %w: %s", strings.Join(args, " "), err, out)
	}
	return nil
}

// upgradeBack lets agents with other programs start, and connects from the moment that of n1 is ready: there the backends
// of every path are chosen.
func (s *serviceStory) upgradeBack(ctx context.Context) error {
	if err := s.upgrade(ctx, "serviceNoBackendResponse=drop"); err != nil {
		return err
	}
	if err := s.keepAgents(ctx); err != nil {
		return err
	}
	if err := s.waitAgent(ctx, "n1", ""); err != nil {
		return err
	}
	s.back = time.Now()
	errs := make([]error, 2*len(s.paths))
	_ = atOnce(len(errs), func(i int) error {
		p := s.paths[i/2]
		if i%2 == 0 {
			errs[i] = s.servedBy(ctx, p, "moving", s.web["n3"].name)
			return nil
		}
		l, err := s.startLoad(ctx, p, "rolling", "graceful", 100, "-for", "1s", "-new", "100")
		if err == nil {
			var r loaded
			if r, err = endLoad(l, false); err == nil {
				if err = r.verdict(100, &s.diary); err != nil {
					err = fmt.Errorf("%s, a service of which two backends have ended: %w", p.name, err)
				}
			}
		}
		errs[i] = err
		return nil
	})
	return errors.Join(append(errs, s.rolledOut(ctx))...)
}

func (s *serviceStory) upgradeAgain(ctx context.Context) error {
	if err := s.upgrade(ctx, "serviceNoBackendResponse=reject"); err != nil {
		return err
	}
	return s.rolledOut(ctx)
}

func (s *serviceStory) endLoads(context.Context) error {
	var errs []error
	for _, p := range s.loads {
		l, err := endLoad(p, true)
		if err == nil {
			s.o.Say("%s: %s", p.name, l)
			if err = l.verdict(quietRate, &s.diary); err == nil && len(l.Servers) != nodes {
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
func (s *serviceStory) endFlows(context.Context) error {
	var errs []error
	for _, f := range s.flows {
		r, err := f.stop()
		lost := r.Lost
		if f.datagrams && lost <= underWay { // their answers met a flow that had another backend by then
			r.Lost = 0
		}
		if err == nil {
			err = r.verdict(&s.diary)
		}
		if gap := time.Duration(r.MaxGapMS * float64(time.Millisecond)); err == nil && gap > flowGap {
			err = fmt.Errorf("silent for %s until %s (%s)", gap, r.MaxGapAt.Format("15:04:05.000"), s.diary.at(r.MaxGapAt))
		}
		if err == nil && f.datagrams {
			err = repinnedInTime(r, s.web["n2"].name, s.web["n3"].name, s.back)
		}
		if err == nil && !f.datagrams && len(r.Servers) != 1 {
			err = fmt.Errorf("one connection was answered by %v", r.Servers)
		}
		if err != nil {
			errs = append(errs, fmt.Errorf("%s: %w", f.name, err))
			continue
		}
		s.o.Say("%s: %d messages, %d lost, longest gap %.0f ms", f.name, r.Sent, lost, r.MaxGapMS)
	}
	s.flows = nil
	return errors.Join(errs...)
}

// repinnedInTime: the backend that was removed answers nothing more shortly after an agent knows, and the other one does.
func repinnedInTime(r probeResult, before, after string, known time.Time) error {
	late := r.Servers[before].Last.Sub(known)
	b, a := r.Servers[before], r.Servers[after]
	switch {
	case b.Answers == 0 || a.Answers == 0 || len(r.Servers) != 2:
		return fmt.Errorf("answered by %v, want %s and then %s", r.Servers, before, after)
	case late > repinned:
		return fmt.Errorf("%s still answers %s after the agent was ready, %s is the limit", before, late, repinned)
	case a.First.Before(b.Last):
		return fmt.Errorf("%s answered at %s and %s still at %s", after, a.First, before, b.Last)
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
