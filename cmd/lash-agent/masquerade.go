// SPDX-License-Identifier: Apache-2.0

package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"time"

	"github.com/lash-net/lash/internal/config"
	"github.com/lash-net/lash/internal/datapath/netdev"
	"github.com/lash-net/lash/internal/model"
	"github.com/lash-net/lash/internal/node"
	"github.com/lash-net/lash/internal/reconcile"
	"github.com/lash-net/lash/internal/state"
)

// sourcePorts are those of translated connections: near ones, which the node's sockets seldom choose by themselves, and
// far ones, zero if there are none. Both keep out of the ports that NodePort services may have.
func sourcePorts(nodePorts config.PortRange) (near, far config.PortRange, err error) {
	below, above := nodePorts.First > 1024, nodePorts.Last < 65535
	switch {
	case below:
		near = config.PortRange{First: 1024, Last: nodePorts.First - 1}
		if above {
			far = config.PortRange{First: nodePorts.Last + 1, Last: 65535}
		}
	case above:
		near = config.PortRange{First: max(nodePorts.Last+1, 1024), Last: 65535}
	default:
		return near, far, fmt.Errorf("node-port-range %d-%d leaves no ports for masquerading: make it smaller", nodePorts.First, nodePorts.Last)
	}
	return near, far, nil
}

// startMasquerading keeps the destinations that see pods' own addresses as the file of ip-masq-agent and the node's
// annotation have them. Connections that are there keep their translation; new ones follow. Where not BPF masquerades, the
// node's netfilter does.
func (a *agent) startMasquerading(g *group) {
	a.task(g, a.netfilterMasquerade())
	if !a.cfg.EnableBPFMasquerade || !a.nodeCfg.MasqueradeIP4 && !a.nodeCfg.MasqueradeIP6 {
		return
	}
	loop := reconcile.New(reconcile.Config[netip.Prefix, struct{}]{
		Name: "datapath-ipmasq", Target: a.dp.NonMasquerade(), Desired: state.Desired(a.tables.DB, a.tables.NonMasquerade.ToTable(), state.NonMasquerade.Split),
		Equal: reconcile.Comparable[struct{}], Report: a.tables.Report, Log: a.log, Throttle: rowThrottle,
	})
	task := a.nonMasquerade()
	if err := task.Do(context.Background()); err != nil { // before the loop, which would take away what an earlier agent wrote
		a.log.Warn("destinations that are not masqueraded to", "error", err)
	}
	a.task(g, task)
	g.start("datapath-ipmasq", loop.Run)
}

// nonMasquerade reads who is not masqueraded to. While the file has a mistake, what it said before holds.
func (a *agent) nonMasquerade() *state.Task {
	file := ipMasqFile{path: a.cfg.IPMasqAgentConfigPath}
	task := &state.Task{Name: "ip-masq-agent", Inputs: []state.Input{state.From(a.tables.NodeObjects.ToTable())}}
	task.Do = func(ctx context.Context) error {
		var err error
		rows := map[netip.Prefix]state.NonMasquerade{}
		earlier := false // what an earlier agent knew holds
		if a.cfg.EnableIPMasqAgent {
			var known *config.IPMasq
			known, err = file.read()
			earlier = file.known == nil
			task.Interval = known.Resync
			for _, p := range known.NonMasquerade {
				rows[p] = state.NonMasquerade{Prefix: p, Source: "ip-masq-agent"}
			}
		}
		w := a.tables.DB.WriteTxn(a.tables.NonMasquerade)
		defer w.Abort()
		if n, _, ok := a.tables.NodeObjects.Get(w, state.NodeObjectBySource(model.SourceKubernetes, a.name)); ok {
			for _, p := range n.NonMasquerade {
				rows[p] = state.NonMasquerade{Prefix: p, Source: "annotation of the node"}
			}
		} else if complete, _ := a.tables.NodeObjects.Initialized(w); !complete {
			earlier = true
		}
		if earlier {
			known, listErr := a.dp.NonMasquerade().List(ctx)
			err = errors.Join(err, listErr)
			if len(known) > 0 && a.cfg.EnableIPMasqAgent && file.known == nil {
				clear(rows) // of defaults
			}
			for p := range known {
				if _, ok := rows[p]; !ok {
					rows[p] = state.NonMasquerade{Prefix: p, Source: "an earlier agent"}
				}
			}
		}
		var wanted []state.NonMasquerade
		for p, r := range rows {
			if a.nodeCfg.Enabled(p.Addr()) {
				wanted = append(wanted, r)
			}
		}
		if state.Replace(w, a.tables.NonMasquerade, wanted, reconcile.Comparable[state.NonMasquerade], state.All[state.NonMasquerade]) {
			w.Commit()
			a.log.Info("destinations that are not masqueraded to changed", "count", len(wanted))
		}
		return err
	}
	return task
}

// ipMasqFile is the file of ip-masq-agent as it was last understood.
type ipMasqFile struct {
	path  string
	data  []byte
	known *config.IPMasq // nil: it never was
	err   error
}

// read returns what the file says; with a mistake in it, what it said before, or else the defaults.
func (f *ipMasqFile) read() (*config.IPMasq, error) {
	data, err := os.ReadFile(f.path)
	if errors.Is(err, os.ErrNotExist) {
		data, err = []byte{}, nil
	}
	if err != nil {
		err = fmt.Errorf("ip-masq-agent: %w", err)
	} else if f.data == nil || !bytes.Equal(data, f.data) {
		known, err := config.ParseIPMasq(f.path, data)
		if f.data, f.err = data, err; err == nil {
			f.known = known
		} else {
			f.err = fmt.Errorf("%w; what was known before holds", err)
		}
	}
	if f.known != nil {
		return f.known, errors.Join(err, f.err)
	}
	defaults, _ := config.ParseIPMasq(f.path, nil)
	return defaults, errors.Join(err, f.err)
}

// masqueradeMode is the word for who masquerades.
func (a *agent) masqueradeMode() string {
	switch {
	case !a.cfg.EnableBPFMasquerade:
		return "IPTables"
	case a.cfg.EnableIPMasqAgent:
		return "BPF (ip-masq-agent)"
	}
	return "BPF"
}

// netfilterEvery bounds how long rules stay away that somebody has removed.
const netfilterEvery = 5 * time.Second

// netfilterMasquerade keeps netfilter's rules as they must be: none, unless it is to masquerade.
func (a *agent) netfilterMasquerade() *state.Task {
	task := &state.Task{Name: "netfilter-masquerade", Do: func(context.Context) error {
		_, err4 := a.host.SetMasquerade(false, nil, false)
		_, err6 := a.host.SetMasquerade(true, nil, false)
		return errors.Join(err4, err6)
	}}
	if a.cfg.EnableBPFMasquerade {
		return task
	}
	near, far, _ := sourcePorts(a.cfg.NodePortRange)
	if far == (config.PortRange{}) {
		far = near
	}
	task.Interval = netfilterEvery
	task.Inputs = []state.Input{state.From(a.tables.Nodes.ToTable()), state.From(a.tables.Local.ToTable()), state.From(a.tables.NodeObjects.ToTable())}
	task.Do = func(context.Context) (errs error) {
		txn := a.tables.DB.ReadTxn()
		complete, _ := a.tables.Nodes.Initialized(txn)
		n, _ := a.local(txn)
		own, _, _ := a.tables.NodeObjects.Get(txn, state.NodeObjectBySource(model.SourceKubernetes, a.name))
		for _, ipv6 := range []bool{false, true} {
			enabled := a.cfg.EnableIPv4 && a.nodeCfg.MasqueradeIP4
			if ipv6 {
				enabled = a.cfg.EnableIPv6 && a.nodeCfg.MasqueradeIP6
			}
			var m *netdev.Masquerade
			if enabled {
				pods, except := node.Masqueraded(a.nodeCfg, n, append(state.Rows(txn, a.tables.Nodes), n), own.NonMasquerade, ipv6)
				m = &netdev.Masquerade{Pods: pods, Except: except, FirstPort: far.First, LastPort: far.Last}
			}
			changed, err := a.host.SetMasquerade(ipv6, m, !complete)
			errs = errors.Join(errs, err)
			if changed {
				a.log.Info("netfilter rules written", "ipv6", ipv6, "masquerading", enabled)
			}
		}
		return errs
	}
	return task
}
