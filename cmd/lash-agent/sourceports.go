// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"time"

	"github.com/lash-net/lash/internal/datapath"
	"github.com/lash-net/lash/internal/k8s"
	"github.com/lash-net/lash/internal/reconcile"
	"github.com/lash-net/lash/internal/state"
)

const (
	sourcePortsEvery  = 10 * time.Second
	exhaustedSeconds  = 60 // since the last drop, until a destination is no longer told of
	sourcePortsPrefix = "source-ports/"
	usersTold         = 3
)

// exhaustedPorts tells towards which destinations no source port is left, and who has them: as a warning of the status,
// in the log and by an Event on the node. While there are none it reads an empty map.
func (a *agent) exhaustedPorts() *state.Task {
	told := map[datapath.Towards]bool{} // also by Event
	return &state.Task{
		Name: "source-ports", Interval: sourcePortsEvery,
		Do: func(ctx context.Context) error {
			full, err := a.dp.ExhaustedPorts(exhaustedSeconds)
			if err != nil {
				return err
			}
			var uses []datapath.PortUse
			if len(full) > 0 {
				if uses, err = a.dp.PortUses(full); err != nil {
					return err
				}
			}
			var rows []state.Warning
			var problems []k8s.Problem
			for _, u := range uses {
				what := fmt.Sprintf("no source port is left for connections from %s", u.Towards)
				users := a.portUsers(u)
				rows = append(rows, state.Warning{
					Key:  sourcePortsPrefix + u.String(),
					Text: fmt.Sprintf("%s: %d of %d are in use, %d packets were dropped; most by %s", what, u.Ports, a.dp.SNATPorts(), u.Dropped, users),
				})
				// Without numbers: told again, it is the same Event.
				text := what
				if len(u.Users) > 0 {
					text += "; most are used by " + a.ownerOf(u.Users[0].Addr)
				}
				if _, known := told[u.Towards]; !known {
					a.log.Warn(what, "inUse", u.Ports, "dropped", u.Dropped, "by", users)
				}
				if !told[u.Towards] {
					told[u.Towards] = false
					problems = append(problems, k8s.Problem{Kind: "Node", Namespace: "default", Name: a.name, UID: a.name, Reason: "SourcePortsExhausted", Text: text})
				}
			}
			w := a.tables.DB.WriteTxn(a.tables.Warnings)
			defer w.Abort()
			mine := func(row state.Warning) bool { return strings.HasPrefix(row.Key, sourcePortsPrefix) }
			if state.Replace(w, a.tables.Warnings, rows, reconcile.Comparable[state.Warning], mine) {
				w.Commit()
			}
			for t := range told {
				if _, lasts := full[t]; !lasts {
					delete(told, t)
				}
			}
			ctx, cancel := context.WithTimeout(ctx, sourcePortsEvery/2)
			defer cancel()
			for _, p := range problems {
				if err := a.api.Events("lash-agent").Put(ctx, p, struct{}{}); err != nil {
					return fmt.Errorf("event on node %s: %w", a.name, err)
				}
			}
			for t := range told {
				told[t] = true
			}
			return nil
		},
	}
}

// portUsers are the first users of a destination's ports: "default/web (28000), default/cron (12) and 3 more".
func (a *agent) portUsers(u datapath.PortUse) string {
	var out []string
	for _, user := range u.Users[:min(len(u.Users), usersTold)] {
		out = append(out, fmt.Sprintf("%s (%d)", a.ownerOf(user.Addr), user.Ports))
	}
	text := strings.Join(out, ", ")
	if more := len(u.Users) - usersTold; more > 0 {
		text += fmt.Sprintf(" and %d more", more)
	}
	return text
}

// ownerOf names the pod that has an address; an address of somebody else is its own name.
func (a *agent) ownerOf(addr netip.Addr) string {
	txn := a.tables.DB.ReadTxn()
	for ep := range a.tables.Endpoints.All(txn) {
		if ep.IPv4 == addr || ep.IPv6 == addr {
			return ep.PodName()
		}
	}
	if n, _ := a.local(txn); slices.Contains(n.Addrs, addr) {
		return "this node"
	}
	return addr.String()
}

// dumpSourcePorts is the table "nat-top".
func (a *agent) dumpSourcePorts(dp *datapath.Datapath) ([]string, [][]string, error) {
	full, err := dp.ExhaustedPorts(exhaustedSeconds)
	if err != nil {
		return nil, nil, err
	}
	uses, err := dp.PortUses(nil)
	if err != nil {
		return nil, nil, err
	}
	columns := []string{"FROM", "PROTO", "TO", "PORTS", "OF", "DROPPED", "MOST BY"}
	var rows [][]string
	for _, u := range uses {
		dropped := ""
		if f, ok := full[u.Towards]; ok {
			dropped = fmt.Sprintf("%d, the last %ds ago", f.Dropped, f.Seconds)
		}
		rows = append(rows, []string{u.Node.String(), datapath.ProtoName(u.Proto), u.To.String(), fmt.Sprint(u.Ports), fmt.Sprint(dp.SNATPorts()), dropped, a.portUsers(u)})
	}
	return columns, rows, nil
}
