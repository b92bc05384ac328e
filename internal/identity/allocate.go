// SPDX-License-Identifier: Apache-2.0

package identity

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/cilium/statedb"

	"github.com/lash-net/lash/internal/model"
	"github.com/lash-net/lash/internal/reconcile"
	"github.com/lash-net/lash/internal/state"
)

// Need is what a set of labels lacks.
type Need struct {
	Prefer model.Identity // no number; pods with these labels had this one before, 0 if none
	Marked model.Identity // has this number, which the operator is about to delete for want of a user
}

// Pending is the Desired function of the loop that allocates: the label sets of this node's pods that have no number,
// or one that is about to go. What has one is not in it any more, and comes back if the number is lost.
func Pending(t *state.Tables) func() reconcile.Snapshot[model.Labels, Need] {
	rows := &state.Keyed[model.Labels, Need]{
		Sources: []state.Source[model.Labels]{
			state.Touches(t.DB, t.PodIdentities, func(r state.PodIdentity) []model.Labels { return []model.Labels{r.Labels} }),
			state.Touches(t.DB, t.Identities, func(r state.Identity) []model.Labels { return []model.Labels{r.Labels} }),
		},
		Prepare: func(now statedb.ReadTxn) func(statedb.ReadTxn, model.Labels) (Need, bool) {
			known, _ := t.Identities.Initialized(now)
			return func(txn statedb.ReadTxn, labels model.Labels) (need Need, ok bool) {
				if !known { // what is allocated
					return need, false
				}
				for pod := range t.PodIdentities.List(txn, state.PodIdentitiesByLabels(labels)) {
					if pod.Identity == model.IdentityUnknown {
						need, ok = Need{Prefer: max(need.Prefer, had(t, txn, pod))}, true
					} else if id, _, found := t.Identities.Get(txn, state.IdentityByID(pod.Identity)); found && id.Unused && !ok {
						need, ok = Need{Marked: pod.Identity}, true
					}
				}
				return need, ok
			}
		},
	}
	return rows.Desired(t.DB)
}

// had is the number with which an endpoint of the pod was restored, if its labels are still the same.
func had(t *state.Tables, txn statedb.ReadTxn, pod state.PodIdentity) model.Identity {
	for ep := range t.Endpoints.List(txn, state.EndpointByPod(pod.Key())) {
		if ep.Identity >= model.IdentityMin && ep.Identity <= model.IdentityMax && pod.Is(ep) && model.LabelsOf(ep.Labels) == pod.Labels {
			return ep.Identity
		}
	}
	return model.IdentityUnknown
}

// Store is the cluster's identities; k8s.Client is one.
type Store interface {
	// CreateIdentity makes the number mean the labels, or reports that it is taken, perhaps by the same labels.
	CreateIdentity(ctx context.Context, id model.Identity, labels model.Labels) (taken bool, err error)
	// IdentityLabels asks what the number means.
	IdentityLabels(ctx context.Context, id model.Identity) (model.Labels, error)
	// UseIdentity takes the operator's mark from an identity. One that is gone is no error.
	UseIdentity(ctx context.Context, id model.Identity) error
}

// Allocator is the target of the loop over Pending. It lists nothing and deletes nothing: rows that are no longer
// wanted have their number.
type Allocator struct {
	Tables *state.Tables
	Store  Store
	Node   string // the name of this one

	turns turns
}

// List implements reconcile.Target.
func (a *Allocator) List(context.Context) (map[model.Labels]Need, error) { return nil, nil }

// Delete implements reconcile.Target.
func (a *Allocator) Delete(context.Context, model.Labels) error { return nil }

// Put gives the labels a number, or saves the one they have.
func (a *Allocator) Put(ctx context.Context, labels model.Labels, need Need) error {
	if need.Marked != model.IdentityUnknown {
		return a.Store.UseIdentity(ctx, need.Marked)
	}
	if a.numbered(ctx, labels) {
		return nil
	}
	try := func(id model.Identity) (ok bool, err error) {
		if row, _, known := a.Tables.Identities.Get(a.Tables.DB.ReadTxn(), state.IdentityByID(id)); known {
			return row.Labels == labels, nil
		}
		began := time.Now()
		taken, err := a.Store.CreateIdentity(ctx, id, labels)
		a.turns.took(time.Since(began))
		if err == nil && taken {
			var owner model.Labels
			owner, err = a.owner(ctx, id)
			ok = owner == labels
		}
		if err != nil {
			return false, fmt.Errorf("identity %d: %w", uint32(id), err)
		}
		return ok || !taken, nil
	}
	if need.Prefer != model.IdentityUnknown {
		if ok, err := try(need.Prefer); ok || err != nil {
			return err
		}
	}
	id := labels.Number()
	for range model.IdentityMax - model.IdentityMin + 1 {
		if ok, err := try(id); ok || err != nil {
			return err
		}
		id = id.Next()
	}
	return errors.New("all 65280 identities of the cluster are in use: fewer labels must be security-relevant (configuration key labels)")
}

// hearsay is how long a number that another node was quicker to take is waited for to come by the watch.
const hearsay = 200 * time.Millisecond

// owner is what a number means that was taken a moment ago. Nodes that start pods of one kind at the same time all want
// the same number; that one got it the others hear anyway, so they ask only if it does not come.
func (a *Allocator) owner(ctx context.Context, id model.Identity) (model.Labels, error) {
	soon, cancel := context.WithTimeout(ctx, hearsay)
	defer cancel()
	for {
		row, _, changed, ok := a.Tables.Identities.GetWatch(a.Tables.DB.ReadTxn(), state.IdentityByID(id))
		if ok {
			return row.Labels, nil
		}
		select {
		case <-changed:
		case <-soon.Done():
			return a.Store.IdentityLabels(ctx, id)
		}
	}
}
