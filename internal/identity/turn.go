// SPDX-License-Identifier: Apache-2.0

package identity

import (
	"cmp"
	"context"
	"crypto/sha256"
	"encoding/binary"
	"sync/atomic"
	"time"

	"github.com/lash-net/lash/internal/model"
	"github.com/lash-net/lash/internal/state"
)

// A turn is long enough for the others to hear of an identity that was created at its beginning.
const (
	turnOfAnswers = 3 // as many of the API server's answers as it has come to take
	turnMin       = 5 * time.Millisecond
	turnMax       = 500 * time.Millisecond
	turnsMost     = 2 // that a node waits for, in clusters of any size
)

// turns is what a node knows of how long turns are.
type turns struct{ answer atomic.Int64 }

// took notes how long an answer of the API server took.
func (t *turns) took(d time.Duration) {
	had := t.answer.Load()
	now := int64(d)
	if had != 0 {
		now = had + (now-had)/8
	}
	t.answer.CompareAndSwap(had, now)
}

func (t *turns) length() time.Duration {
	return min(max(turnMin, turnOfAnswers*time.Duration(t.answer.Load())), turnMax)
}

// numbered waits until it is this node's turn to ask for a number for the labels, or until they have one, which it
// reports. The pods of a Deployment that is new start on several nodes at the same time: without turns every node
// creates the identity, and the API server refuses all but one. A turn is a matter of load only. Nobody waits for a
// node to do anything, and two that have their turns at once race as they would without.
func (a *Allocator) numbered(ctx context.Context, labels model.Labels) bool {
	ctx, cancel := context.WithTimeout(ctx, a.turn(labels))
	defer cancel()
	for {
		rows, changed := a.Tables.Identities.ListWatch(a.Tables.DB.ReadTxn(), state.IdentitiesByLabels(labels))
		for range rows {
			return true
		}
		select {
		case <-changed:
		case <-ctx.Done():
			return false
		}
	}
}

// turn is how long this node leaves the labels to others. Each node that is known has its turn, in an order that differs
// from one set of labels to the next and that they agree on without a word; if they are many, turns overlap.
func (a *Allocator) turn(labels model.Labels) time.Duration {
	before, others := 0, 0
	own := place(labels, a.Node)
	for n := range a.Tables.Nodes.All(a.Tables.DB.ReadTxn()) {
		if n.Name == a.Node {
			continue
		}
		others++
		if c := cmp.Compare(place(labels, n.Name), own); c < 0 || c == 0 && n.Name < a.Node {
			before++
		}
	}
	if others == 0 {
		return 0
	}
	return a.turns.length() * time.Duration(min(others, turnsMost)*before) / time.Duration(others)
}

// place says where a node stands among the others for these labels. Names of nodes are alike, so the hash is one that
// mixes well: with FNV neighbours by name would have their turns at the same time.
func place(labels model.Labels, node string) uint64 {
	sum := sha256.Sum256([]byte(string(labels) + "\x00" + node))
	return binary.BigEndian.Uint64(sum[:])
}
