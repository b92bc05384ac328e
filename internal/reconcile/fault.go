// SPDX-License-Identifier: Apache-2.0

package reconcile

import (
	"context"
	"fmt"
	"maps"
	"sync"
)

// Fault is a Target in memory that counts and records its writes and fails on purpose, for tests of loops and of what
// is built on them.
type Fault[K comparable, V any] struct {
	// Fail, if set, decides before each operation ("list", "put", "delete"; k is zero for list) whether it fails.
	Fail func(op string, k K) error
	// Leak makes a failing put or delete take effect all the same, as an interrupted system call may.
	Leak bool

	mu      sync.Mutex
	rows    map[K]V
	history []string
	lists   int
}

// NewFault returns a target that has the rows, as if a previous run had left them.
func NewFault[K comparable, V any](rows map[K]V) *Fault[K, V] {
	f := &Fault[K, V]{rows: map[K]V{}}
	maps.Copy(f.rows, rows)
	return f
}

// Rows is a copy of what the target has.
func (f *Fault[K, V]) Rows() map[K]V {
	f.mu.Lock()
	defer f.mu.Unlock()
	return maps.Clone(f.rows)
}

// Set changes a row behind the loop's back.
func (f *Fault[K, V]) Set(k K, v V) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.rows[k] = v
}

// History lists the writes that took effect, "put k" and "delete k", in order, and forgets them.
func (f *Fault[K, V]) History() []string {
	f.mu.Lock()
	defer f.mu.Unlock()
	h := f.history
	f.history = nil
	return h
}

// Lists is how often the target has been read.
func (f *Fault[K, V]) Lists() int {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.lists
}

// List implements Target.
func (f *Fault[K, V]) List(context.Context) (map[K]V, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.lists++
	var zero K
	if err := f.fail("list", zero); err != nil {
		return nil, err
	}
	return maps.Clone(f.rows), nil
}

// Put implements Target.
func (f *Fault[K, V]) Put(_ context.Context, k K, v V) error {
	f.mu.Lock()
	defer f.mu.Unlock()
	err := f.fail("put", k)
	if err == nil || f.Leak {
		f.rows[k] = v
		f.history = append(f.history, fmt.Sprintf("put %v", k))
	}
	return err
}

// Delete implements Target.
func (f *Fault[K, V]) Delete(_ context.Context, k K) error {
	f.mu.Lock()
	defer f.mu.Unlock()
	err := f.fail("delete", k)
	if err == nil || f.Leak {
		delete(f.rows, k)
		f.history = append(f.history, fmt.Sprintf("delete %v", k))
	}
	return err
}

func (f *Fault[K, V]) fail(op string, k K) error {
	if f.Fail == nil {
		return nil
	}
	return f.Fail(op, k)
}
