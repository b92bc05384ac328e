// SPDX-License-Identifier: Apache-2.0

// Package service turns Services, EndpointSlices and the HostPorts of this node's pods into service ports: which
// frontends are translated to which backends. It writes the tables service-ports and service-health-checks and its part
// of warnings, and owns the numbers of service ports.
//
// A pass costs what changed: the services and pods whose objects did are computed anew (unit.go), and so is whoever
// claims the same frontends.
package service

import (
	"context"
	"maps"
	"net/netip"
	"slices"

	"github.com/cilium/statedb"

	"github.com/lash-net/lash/internal/model"
	"github.com/lash-net/lash/internal/state"
)

// Stage keeps the tables equal to what Services, EndpointSlices and Pods say.
type Stage struct {
	cfg Config
	t   *state.Tables

	services *state.Tracker[state.Service]
	slices   *state.Tracker[state.EndpointSlice]
	pods     *state.Tracker[state.Pod]
	complete []func(statedb.WriteTxn) // announce that the output is; nil once they have

	// Below: used by the goroutine of Run only.
	node      self
	nodeAt    [3]statedb.Revision            // of the tables that node was read from
	serviceOf map[string]string              // by slice, of its last object
	claims    map[string][]*claim            // by owner
	claimants map[model.FrontendKey][]*claim // of each frontend
	notes     map[string][]state.Warning     // by owner: what its objects alone are warned of
	lost      map[name][]state.Warning       // frontends that another has
	dirty     map[string]struct{}            // owners to compute
}

// New registers the stage's inputs and outputs; Run computes. It writes nothing before the inputs are complete: a service
// whose slices have not been read yet would lose its backends, and an address could be a node's.
func New(t *state.Tables, cfg Config) *Stage {
	s := &Stage{
		cfg: cfg, t: t, services: state.Track(t.DB, t.Services), slices: state.Track(t.DB, t.Slices), pods: state.Track(t.DB, t.Pods),
		serviceOf: map[string]string{}, claims: map[string][]*claim{}, claimants: map[model.FrontendKey][]*claim{},
		notes: map[string][]state.Warning{}, lost: map[name][]state.Warning{}, dirty: map[string]struct{}{},
	}
	txn := t.DB.WriteTxn(t.ServicePorts, t.HealthChecks)
	defer txn.Commit()
	s.complete = []func(statedb.WriteTxn){
		t.ServicePorts.RegisterInitializer(txn, "service-stage"), t.HealthChecks.RegisterInitializer(txn, "service-stage"),
	}
	return s
}

// Run computes until ctx ends.
func (s *Stage) Run(ctx context.Context) error {
	inputs := []state.Input{state.From(s.t.Services), state.From(s.t.Slices), state.From(s.t.Pods), state.From(s.t.Local), state.From(s.t.Devices), state.From(s.t.Nodes)}
	for {
		txn := s.t.DB.ReadTxn()
		chans, complete := state.Watch(txn, inputs)
		ws := statedb.NewWatchSet()
		ws.Add(chans...)
		s.read(txn)
		if complete {
			s.write(txn)
		}
		if _, err := ws.Wait(ctx, state.Settle); err != nil || ctx.Err() != nil {
			return nil
		}
	}
}

const podOwner = "pod " // before the name of a pod; that of a service has no space

// read notes whose objects changed.
func (s *Stage) read(txn statedb.ReadTxn) {
	for svc := range s.services.Next(txn) {
		s.dirty[svc.Key()] = struct{}{}
	}
	for slice, gone := range s.slices.Next(txn) {
		// A slice may pass from one service to another.
		if before, ok := s.serviceOf[slice.Key()]; ok {
			s.dirty[before] = struct{}{}
		}
		if gone {
			delete(s.serviceOf, slice.Key())
			continue
		}
		s.serviceOf[slice.Key()] = slice.ServiceKey()
		s.dirty[slice.ServiceKey()] = struct{}{}
	}
	for pod := range s.pods.Next(txn) {
		s.dirty[podOwner+pod.Key()] = struct{}{}
	}
	s.readNode(txn)
}

// readNode notes who is affected by what changed of the node and of its likes. It reads them only if they have: pods come
// and go far more often, and nodes may be thousands.
func (s *Stage) readNode(txn statedb.ReadTxn) {
	at := [...]statedb.Revision{s.t.Local.Revision(txn), s.t.Devices.Revision(txn), s.t.Nodes.Revision(txn)}
	if at == s.nodeAt {
		return
	}
	s.nodeAt = at
	node := self{addrs: map[netip.Addr]bool{}, nodes: map[netip.Addr]bool{}}
	for n := range s.t.Local.All(txn) {
		node.zone, node.labels = n.Zone, n.Labels
		for _, a := range append(slices.Clone(n.Addrs), n.Routers...) {
			node.addrs[a] = true
		}
	}
	for d := range s.t.Devices.All(txn) {
		for _, p := range d.Addrs {
			node.addrs[p.Addr()] = true
		}
	}
	for n := range s.t.Nodes.All(txn) {
		for _, a := range n.Addrs {
			node.nodes[a] = true
		}
	}
	old := s.node
	s.node = node
	if !maps.Equal(node.labels, old.labels) {
		for svc := range s.t.Services.All(txn) {
			if svc.Nodes != "" {
				s.dirty[svc.Key()] = struct{}{}
			}
		}
	}
	if node.zone != old.zone || !maps.Equal(node.addrs, old.addrs) {
		for owner := range s.claims {
			s.dirty[owner] = struct{}{}
		}
		return
	}
	if !maps.Equal(node.nodes, old.nodes) {
		for f, all := range s.claimants {
			for _, c := range all {
				if node.has(f.Addr) != old.has(f.Addr) {
					s.dirty[c.name.owner] = struct{}{}
				}
			}
		}
	}
}

// compute returns what the owner's objects want now.
func (s *Stage) compute(txn statedb.ReadTxn, owner string) (claims []*claim, check state.HealthCheck, warnings []state.Warning) {
	if pod, ok := podKey(owner); ok {
		if p, _, ok := s.t.Pods.Get(txn, state.PodByName(pod)); ok {
			claims, warnings = ofPod(s.cfg, s.node, p)
		}
		return claims, check, warnings
	}
	svc, _, ok := s.t.Services.Get(txn, state.ServiceByName(owner))
	if !ok {
		return nil, check, nil
	}
	claims, local, warnings := ofService(s.cfg, s.node, svc, statedb.Collect(s.t.Slices.List(txn, state.SlicesByService(owner))))
	if svc.HealthCheckNodePort != 0 && len(claims) > 0 {
		check = state.HealthCheck{Namespace: svc.Namespace, Name: svc.Name, Port: svc.HealthCheckNodePort, Endpoints: local}
	}
	return claims, check, warnings
}

func podKey(owner string) (string, bool) {
	if len(owner) > len(podOwner) && owner[:len(podOwner)] == podOwner {
		return owner[len(podOwner):], true
	}
	return "", false
}

// write computes what is dirty and whoever is affected by it, and writes the differences.
func (s *Stage) write(txn statedb.ReadTxn) {
	w := s.t.DB.WriteTxn(s.t.ServicePorts, s.t.HealthChecks, s.t.Warnings)
	defer w.Abort()
	changed := false

	gone := map[name]*claim{}
	affected := map[*claim]struct{}{}
	for owner := range s.dirty {
		claims, check, warnings := s.compute(txn, owner)
		changed = s.check(w, owner, check) || changed
		changed = s.warn(w, s.notes[owner], warnings) || changed
		set(s.notes, owner, warnings)

		old := map[name]*claim{}
		for _, c := range s.claims[owner] {
			old[c.name] = c
		}
		for i, c := range claims {
			before, ok := old[c.name]
			delete(old, c.name)
			if ok && before.rank == c.rank && before.port.Equal(c.port) {
				claims[i] = before
				continue
			}
			if ok {
				s.withdraw(before, affected)
			}
			s.enter(c, affected)
		}
		for who, c := range old {
			s.withdraw(c, affected)
			gone[who] = c
		}
		set(s.claims, owner, claims)
	}
	clear(s.dirty)
	changed = s.emit(w, gone, affected) || changed
	for _, done := range s.complete {
		done(w)
		changed = true
	}
	s.complete = nil
	if changed {
		w.Commit()
	}
}

// enter and withdraw keep the claimants of frontends; everybody who claims one of them is affected.
func (s *Stage) enter(c *claim, affected map[*claim]struct{}) {
	for _, f := range c.port.Frontends {
		all := append(s.claimants[f.FrontendKey], c)
		s.claimants[f.FrontendKey] = all
		for _, o := range all {
			affected[o] = struct{}{}
		}
	}
	affected[c] = struct{}{}
}

func (s *Stage) withdraw(c *claim, affected map[*claim]struct{}) {
	for _, f := range c.port.Frontends {
		all := slices.DeleteFunc(s.claimants[f.FrontendKey], func(o *claim) bool { return o == c })
		set(s.claimants, f.FrontendKey, all)
		for _, o := range all {
			affected[o] = struct{}{}
		}
	}
	delete(affected, c)
}

// emit writes the rows of affected claims, each with the frontends that nobody claims with more right.
func (s *Stage) emit(w statedb.WriteTxn, gone map[name]*claim, affected map[*claim]struct{}) (changed bool) {
	goneRows, cameRows := map[name][]model.Frontend{}, map[name][]model.Frontend{}
	row := func(who name) (model.ServicePort, bool) {
		id, ok := s.cfg.Numbers.byName[who]
		if !ok {
			return model.ServicePort{}, false
		}
		r, _, ok := s.t.ServicePorts.Get(w, state.ServicePortByID(id))
		return r, ok
	}
	remove := func(who name) {
		if r, ok := row(who); ok {
			goneRows[who] = r.Frontends
			state.Remove(w, s.t.ServicePorts, r)
			changed = true
		}
	}
	for who := range gone {
		remove(who)
		changed = s.warn(w, s.lost[who], nil) || changed
		delete(s.lost, who)
	}
	var rows []*model.ServicePort
	var names []name
	for c := range affected {
		r, lost := s.granted(c)
		changed = s.warn(w, s.lost[c.name], lost) || changed
		set(s.lost, c.name, lost)
		if len(r.Frontends) == 0 {
			remove(c.name)
			continue
		}
		if _, ok := row(c.name); !ok {
			cameRows[c.name] = r.Frontends
		}
		rows, names = append(rows, &r), append(names, c.name)
	}
	if len(goneRows)+len(cameRows) > 0 {
		s.cfg.Numbers.settle(goneRows, cameRows)
	}
	for i, r := range rows {
		r.ID = s.cfg.Numbers.byName[names[i]]
		if old, ok := row(names[i]); ok && old.Equal(*r) {
			continue
		}
		state.Put(w, s.t.ServicePorts, *r)
		changed = true
	}
	return changed
}

// granted is the claim's row without number, and a warning for each frontend that another has.
func (s *Stage) granted(c *claim) (row model.ServicePort, lost []state.Warning) {
	row = c.port
	var mine []model.Frontend
	for _, f := range c.port.Frontends {
		winner := c
		for _, o := range s.claimants[f.FrontendKey] {
			if o.before(winner) {
				winner = o
			}
		}
		if winner == c {
			mine = append(mine, f)
			continue
		}
		lost = append(lost, warn(c.about(), "%s %s is that of %s: give one of them another address or port", f.Type, f.FrontendKey, winner.about()))
	}
	if len(lost) > 0 {
		row.Frontends = mine
	}
	return row, lost
}

// about names the object for a person.
func (c *claim) about() string {
	if c.rank.pod {
		return c.name.owner
	}
	return "service " + c.name.owner
}

// warn makes the warnings of old those of now.
func (s *Stage) warn(w statedb.WriteTxn, old, now []state.Warning) (changed bool) {
	for _, o := range old {
		if !slices.Contains(now, o) {
			state.Remove(w, s.t.Warnings, o)
			changed = true
		}
	}
	for _, n := range now {
		if !slices.Contains(old, n) {
			state.Put(w, s.t.Warnings, n)
			changed = true
		}
	}
	return changed
}

// check makes the health check of the owner the one given; one without port is none.
func (s *Stage) check(w statedb.WriteTxn, owner string, check state.HealthCheck) (changed bool) {
	old, _, had := s.t.HealthChecks.Get(w, state.HealthCheckByService(owner))
	switch {
	case check.Port == 0 && had:
		state.Remove(w, s.t.HealthChecks, old)
	case check.Port != 0 && (!had || old != check):
		state.Put(w, s.t.HealthChecks, check)
	default:
		return false
	}
	return true
}

// set stores a list, none as absence.
func set[K comparable, V any](m map[K][]V, k K, list []V) {
	if len(list) == 0 {
		delete(m, k)
		return
	}
	m[k] = list
}
