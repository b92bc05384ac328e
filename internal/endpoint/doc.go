// SPDX-License-Identifier: Apache-2.0

// Package endpoint is a pod's life on its node: CNI ADD, devices, programs, rows, checkpoint, answer; and back.
//
// It owns the endpoints table and the checkpoints below state-dir, which outlive the agent. It reads the plugin's
// requests from a socket and the queue of deletions that came while no agent ran. The kernel is reached through the
// small interfaces of [Config].
//
// What holds at any moment: a pod's device is up only while programs are attached to it and rows of its addresses are
// in the datapath's maps; an answered ADD has a checkpoint; an ADD that failed has left nothing; what is in the kernel
// without a checkpoint is removed at the next start.
package endpoint
