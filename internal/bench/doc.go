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
// Every path is measured by turns with its own baseline, each for a moment: baseline,
// path, path, baseline. What the machine does meanwhile is in both figures. The rounds
// are many and shuffled, and the median of their ratios is the result. A latency is a
// median over batches of exchanges, a rate of connects one over slices of time.
//
// The switch between nodes does nothing with a frame but hand it on. What it costs is in
// both figures, and twice where a packet takes two hops. Events are compared on the same
// pods with and without a listener: two like clusters differ by more than events cost.
package bench
