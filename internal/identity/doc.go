// SPDX-License-Identifier: Apache-2.0

// Package identity turns labels into numbers: which labels of a pod of this node make its identity, which number they
// have, and what the cluster is told of the pod. It reads the tables pods, namespaces, identities, endpoints,
// cilium-endpoints and local-node and writes pod-identities. It touches neither the API server nor the datapath: the
// loops over [Pending] and [Published] do, through targets.
//
// Numbers are allocated without coordination. A set of labels has its own first number, a hash; creating the
// CiliumIdentity of that name is the compare-and-swap, and a name taken by other labels leads on to the next. Nodes
// that race for the same labels end with the same object; that they seldom race is what turns are for (turn.go): a
// refused creation costs the API server as much as one that succeeds. An identity depends on labels only, so it is asked
// for as soon as a pod is bound to the node, before the pod has a network.
//
// Numbers from 1<<24 on are this node's own (model.IdentityLocal): policy will allocate those of CIDRs here.
package identity
