// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"errors"
	"fmt"
	"os"

	api "github.com/lash-net/lash/api/agent"
	"github.com/lash-net/lash/internal/datapath"
	"github.com/lash-net/lash/internal/datapath/netdev"
	"github.com/lash-net/lash/internal/state"
)

// sockmap lets the connections within the pods that ask for it (state.Pod.Sockmap) do without packets. Its program is
// attached only while this node has such a pod: it is run for every TCP connection.
func (a *agent) sockmap() *state.Task {
	attached := false
	return &state.Task{
		Name:   "sockmap",
		Inputs: []state.Input{state.From(a.tables.Pods.ToTable()), state.From(a.tables.Endpoints.ToTable())},
		Do: func(context.Context) error {
			txn := a.tables.DB.ReadTxn()
			if complete, _ := a.tables.Pods.Initialized(txn); !complete {
				return nil
			}
			asked := map[uint64]bool{}
			var errs []error
			for ep := range a.tables.Endpoints.All(txn) {
				p, _, ok := a.tables.Pods.Get(txn, state.PodByName(ep.PodName()))
				if !ok || !p.Sockmap || p.Ended() {
					continue
				}
				cookie, err := netnsCookie(ep.NetnsPath)
				if err != nil {
					errs = append(errs, fmt.Errorf("pod %s: %w", p.Key(), err))
					continue
				}
				asked[cookie] = true
			}
			errs = append(errs, a.dp.SetLocalNetns(asked))
			switch {
			case len(asked) == 0:
				attached = false
				errs = append(errs, a.dp.DetachLocal())
			case !attached:
				path, err := cgroupRoot(a.cfg.CgroupRoot)
				if err == nil {
					err = a.dp.AttachLocal(path)
				}
				attached = err == nil
				errs = append(errs, err)
			}
			return errors.Join(errs...)
		},
	}
}

// netnsCookie is the number of a pod's network namespace.
func netnsCookie(path string) (cookie uint64, err error) {
	ns, err := os.Open(path)
	if err != nil {
		return 0, fmt.Errorf("network namespace: %w", err)
	}
	defer ns.Close()
	err = netdev.InNetns(ns, func() (err error) {
		cookie, err = datapath.NetnsCookie()
		return err
	})
	return cookie, err
}

// sockmapFact is what status says of it.
func sockmapFact(dp *datapath.Datapath) api.Sockmap {
	c, err := dp.LocalCounts()
	if err != nil {
		return api.Sockmap{Reason: err.Error()}
	}
	return api.Sockmap{Pods: c.Netns, Messages: c.Messages, Bytes: c.Bytes, Bulk: c.Bulk, Reason: c.Unable}
}
