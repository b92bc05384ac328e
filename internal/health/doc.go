// SPDX-License-Identifier: Apache-2.0

// Package health lets nodes find out whether they reach each other: a [Responder] answers, a [Prober] asks. Each node is
// asked at its own addresses and at those of its health endpoint, in both families, by an ICMP echo, which its kernel
// answers, and by GET /hello on one port, which its agent does. The prober reads the table nodes and owns node-health.
//
// The health endpoint stands for a pod: what a node's probe of it passes is what a packet from that node to a pod passes.
// It is a network namespace that the agent makes, attaches as it does a pod (internal/endpoint) and listens in. A process
// of its own in it would be one more thing to start, watch, end, and find again after the agent was killed; a name for it
// would outlive the agent and answer ICMP for one that is dead. So the agent's open file and sockets are all that holds
// it: it goes on as long as the agent does, and when that ends, however it does, the kernel takes namespace and devices
// away. The next agent makes it anew, with the same addresses. Pods' packets have nothing to do with it.
package health
