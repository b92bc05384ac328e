// SPDX-License-Identifier: Apache-2.0

// Package operator does what a cluster needs done once: it installs the definitions of the cilium.io kinds, gives each
// node its pod CIDRs (ipam cluster-pool) and removes the CiliumNodes of nodes that are gone.
//
// It reads Nodes, CiliumNodes, ServiceCIDRs and the configuration. It writes CustomResourceDefinitions, CiliumNode
// spec.ipam.podCIDRs and status.ipam.operator-status, and deletes CiliumNodes. Only the replica that holds the lease
// lash-operator-resource-lock writes, and it stops writing before it gives the lease up.
package operator
