// SPDX-License-Identifier: Apache-2.0

package operator

import (
	"context"
	"log/slog"
	"strings"
	"sync"
	"time"

	"github.com/cilium/statedb"
	"k8s.io/client-go/rest"

	"github.com/lash-net/lash/internal/config"
	"github.com/lash-net/lash/internal/k8s"
	"github.com/lash-net/lash/internal/reconcile"
	"github.com/lash-net/lash/internal/service"
	"github.com/lash-net/lash/internal/state"
)

// toldAgain is how often a problem that lasts is told by its Event, which the API server forgets after an hour.
const toldAgain = 45 * time.Minute

// reportProblems tells what is wrong with Services and EndpointSlices by Events on them until ctx ends. The leader does
// it, because every agent finds the same: one writer instead of one a node. It judges by the agents' own code.
func reportProblems(ctx context.Context, cfg *config.Config, log *slog.Logger, restConfig *rest.Config) error {
	client, err := k8s.NewClient(restConfig)
	if err != nil {
		return err
	}
	tables, err := state.New()
	if err != nil {
		return err
	}
	defer tables.Stop()
	quiet := slog.New(slog.DiscardHandler) // agents log the same
	validators := k8s.ServiceValidators(client, tables, cfg.K8sServiceProxyName, quiet)
	stage := service.New(tables, service.Config{
		IPv4: cfg.EnableIPv4, IPv6: cfg.EnableIPv6, NodePortFirst: cfg.NodePortRange.First, NodePortLast: cfg.NodePortRange.Last, Numbers: service.NewNumbers(nil),
	})
	loop := reconcile.New(reconcile.Config[k8s.Problem, struct{}]{
		Name: "events", Target: client.Events("lash-operator"), Desired: wantedProblems(tables), Equal: reconcile.Comparable[struct{}],
		Throttle: time.Second, Reread: toldAgain, Log: log,
	})
	var wg sync.WaitGroup
	for _, v := range validators {
		wg.Go(func() { v.Run(ctx) })
	}
	wg.Go(func() { stage.Run(ctx) })
	wg.Go(func() { loop.Run(ctx) })
	wg.Wait()
	return nil
}

// uidOf is what tells the object from another one of its name; ok: there is such an object.
func uidOf(t *state.Tables, txn statedb.ReadTxn, kind, key string) (uid string, ok bool) {
	if kind == "Service" {
		svc, _, ok := t.Services.Get(txn, state.ServiceByName(key))
		return svc.UID, ok
	}
	slice, _, ok := t.Slices.Get(txn, state.SliceByName(key))
	return slice.UID, ok
}

// wantedProblems are those of single objects, and of objects that do not fit together: two services with the same
// frontend, a slice and its service.
func wantedProblems(t *state.Tables) func() reconcile.Snapshot[k8s.Problem, struct{}] {
	inputs := []state.Input{state.From(t.BadObjects), state.From(t.Warnings), state.From(t.ServicePorts)}
	return state.DesiredOf(t.DB, inputs, func(txn statedb.ReadTxn) map[k8s.Problem]struct{} {
		rows := map[k8s.Problem]struct{}{}
		for b := range t.BadObjects.All(txn) {
			namespace, name, _ := strings.Cut(b.Name, "/")
			rows[k8s.Problem{Kind: b.Kind, Namespace: namespace, Name: name, UID: b.UID, Text: b.Field + ": " + b.Problem}] = struct{}{}
		}
		for w := range t.Warnings.All(txn) {
			kind, key, text, ok := service.Subject(w)
			if !ok {
				continue
			}
			if uid, ok := uidOf(t, txn, kind, key); ok {
				namespace, name, _ := strings.Cut(key, "/")
				rows[k8s.Problem{Kind: kind, Namespace: namespace, Name: name, UID: uid, Text: text}] = struct{}{}
			}
		}
		return rows
	})
}
