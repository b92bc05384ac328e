// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"errors"
	"fmt"

	"github.com/lash-net/lash/internal/state"
)

// unmanagedPods restarts pods that ran before the agent and have their network from nobody or from another plugin.
func (a *agent) unmanagedPods() *state.Task {
	var w unmanagedWatch
	return &state.Task{
		Name:     "unmanaged-pods",
		Interval: a.cfg.UnmanagedPodWatcherPeriod,
		Do: func(ctx context.Context) error {
			txn := a.tables.DB.ReadTxn()
			if complete, _ := a.tables.Pods.Initialized(txn); !complete {
				return nil
			}
			restart, lost := w.look(state.Rows(txn, a.tables.Pods), func(p state.Pod) bool {
				_, _, ok := a.tables.Endpoints.Get(txn, state.EndpointByPod(p.Key()))
				return ok
			})
			for _, p := range lost {
				a.log.Warn("pod ran before the agent and has no controller that would make it anew: delete and create it yourself", "pod", p.Key())
			}
			var errs []error
			for _, p := range restart {
				a.log.Info("pod ran before the agent and is restarted", "pod", p.Key())
				if err := a.api.DeletePod(ctx, p.Namespace, p.Name, p.UID); err != nil {
					w.again(p)
					errs = append(errs, fmt.Errorf("restart pod %s: %w", p.Key(), err))
				}
			}
			return errors.Join(errs...)
		},
	}
}

// unmanagedWatch remembers how often each pod was found without an endpoint. A pod is acted on when it is found the
// second time, so that one that is just being attached is left alone, and once only.
type unmanagedWatch struct{ found map[string]int } // by UID

// look returns the pods to restart, and those that nobody would make anew and a person must see to. Mirrors of static
// pods are among the latter: deleting the mirror restarts nothing.
func (w *unmanagedWatch) look(pods []state.Pod, managed func(state.Pod) bool) (restart, lost []state.Pod) {
	now := map[string]int{}
	for _, p := range pods {
		if p.HostNetwork || p.Terminating || !p.Running || p.Phase != "Running" || managed(p) {
			continue
		}
		now[p.UID] = w.found[p.UID] + 1
		if now[p.UID] != 2 {
			continue
		}
		if p.Controlled && !p.Mirror {
			restart = append(restart, p)
		} else {
			lost = append(lost, p)
		}
	}
	w.found = now
	return restart, lost
}

// again makes the pod be acted on at the next look.
func (w *unmanagedWatch) again(p state.Pod) { w.found[p.UID] = 1 }
