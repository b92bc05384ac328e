// SPDX-License-Identifier: Apache-2.0

// Package reconcile makes kernel objects equal to the rows of a table. It owns the one loop that does so, for rows of
// BPF maps, routes, links and Kubernetes objects alike; it reads a snapshot of wanted rows and the target's own list,
// and writes only through the Target. It knows no domain.
package reconcile
