// SPDX-License-Identifier: Apache-2.0

// Package bench measures what Lash costs: TCP request/response latency, connect
// rate and streams, and small datagrams a second, within a node and between nodes
// and by services, in both families, against the bare namespaces in the same run.
//
// It owns network namespaces without names, which end with the process however
// that ends, and one worker process in each end of a path. It reads and writes
// nothing of the namespace it was started in.
//
// Client and server of rr, crr, stream and pps share one CPU at real-time priority:
// a figure is then the CPU cost of the whole path, not of wake-ups between CPUs.
// Cells are short and shuffled; each is compared with its baseline of the same
// round, measured next to it, and the median of those ratios is the result.
package bench
