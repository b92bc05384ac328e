// SPDX-License-Identifier: Apache-2.0

package endpoint

import (
	"context"
	"fmt"
	"maps"
	"slices"
	"sync"
	"time"

	"github.com/cilium/statedb"

	"github.com/lash-net/lash/api/agent"
	"github.com/lash-net/lash/internal/model"
	"github.com/lash-net/lash/internal/state"
)

const (
	logLen     = 32  // changes remembered of one endpoint
	logDeleted = 256 // deleted endpoints remembered
)

// Log remembers the recent changes of this node's endpoints, also of those that are gone.
type Log struct {
	tables *state.Tables
	// changed is told each change; kind is created, regenerated or deleted. It may be nil.
	changed func(kind string, ep model.Endpoint)

	mu      sync.Mutex
	changes map[uint16][]agent.EndpointChange
	last    map[uint16]model.Endpoint
	deleted []uint16 // oldest first
}

// NewLog makes a log that Run fills.
func NewLog(tables *state.Tables, changed func(kind string, ep model.Endpoint)) *Log {
	return &Log{tables: tables, changed: changed, changes: map[uint16][]agent.EndpointChange{}, last: map[uint16]model.Endpoint{}}
}

// Of returns what became of an endpoint, oldest first.
func (l *Log) Of(id uint16) []agent.EndpointChange {
	l.mu.Lock()
	defer l.mu.Unlock()
	return slices.Clone(l.changes[id])
}

// Run follows the table until ctx ends.
func (l *Log) Run(ctx context.Context) error {
	changes, err := l.follow()
	if err != nil {
		return err
	}
	for {
		more := l.look(changes)
		select {
		case <-ctx.Done():
			return nil
		case <-more:
		}
	}
}

func (l *Log) follow() (statedb.ChangeIterator[model.Endpoint], error) {
	txn := l.tables.DB.WriteTxn(l.tables.Endpoints)
	defer txn.Commit()
	changes, err := l.tables.Endpoints.Changes(txn)
	if err != nil {
		return nil, fmt.Errorf("follow endpoints: %w", err)
	}
	return changes, nil
}

// look takes note of what has changed, and returns what is closed when there is more.
func (l *Log) look(changes statedb.ChangeIterator[model.Endpoint]) <-chan struct{} {
	seq, more := changes.Next(l.tables.DB.ReadTxn())
	for c := range seq {
		l.note(c)
	}
	return more
}

func (l *Log) note(c statedb.Change[model.Endpoint]) {
	ep := c.Object
	l.mu.Lock()
	before, known := l.last[ep.ID]
	if known && before.ContainerID != ep.ContainerID { // the number has gone to another pod
		known = false
	}
	kind, message := "", ""
	switch {
	case c.Deleted:
		kind, message = "deleted", "endpoint deleted"
		ep.State = "deleted"
		l.forget(ep.ID)
	case !known:
		kind, message = "created", seen(ep)
		l.last[ep.ID] = ep
	default:
		message = difference(before, ep)
		if before.Identity != ep.Identity || before.State != ep.State && ep.State == model.EndpointReady {
			kind = "regenerated"
		}
		l.last[ep.ID] = ep
	}
	if message != "" {
		rows := append(l.changes[ep.ID], agent.EndpointChange{Time: time.Now().UTC(), Status: status(ep.State), State: ep.State, Message: message})
		l.changes[ep.ID] = rows[max(0, len(rows)-logLen):]
	}
	l.mu.Unlock()
	if kind != "" && l.changed != nil {
		l.changed(kind, ep)
	}
}

func seen(ep model.Endpoint) string {
	if isHealth(ep) {
		return "health endpoint seen for the first time"
	}
	return fmt.Sprintf("endpoint of pod %s seen for the first time", ep.PodName())
}

// forget limits what is remembered of endpoints that are gone.
func (l *Log) forget(id uint16) {
	delete(l.last, id)
	l.deleted = append(l.deleted, id)
	if len(l.deleted) > logDeleted {
		if old := l.deleted[0]; l.last[old].ID == 0 { // not in use again
			delete(l.changes, old)
		}
		l.deleted = l.deleted[1:]
	}
}

func status(s string) string {
	if s == model.EndpointDisconnected {
		return "Failure"
	}
	return "OK"
}

// difference says what a person wants to know of a change; empty: nothing.
func difference(before, now model.Endpoint) string {
	switch {
	case before.State != now.State:
		return fmt.Sprintf("%s, was %s", now.State, before.State)
	case before.Identity != now.Identity:
		return fmt.Sprintf("identity %d, was %d", now.Identity, before.Identity)
	case !maps.Equal(before.Labels, now.Labels):
		return "labels changed"
	}
	return ""
}
