// SPDX-License-Identifier: Apache-2.0

// Package operator does what a cluster needs done once: it installs the definitions of the cilium.io kinds, gives each
// node its pod CIDRs (ipam cluster-pool), and removes the CiliumNodes of nodes that are gone, the CiliumEndpoints of pods
// that are gone, and identities that nobody has any more.
//
// It reads Nodes, CiliumNodes, ServiceCIDRs, Pods, CiliumEndpoints, CiliumIdentities and the configuration. It writes
// CustomResourceDefinitions, CiliumNode spec.ipam.podCIDRs and status.ipam.operator-status, the mark of unused
// CiliumIdentities, and deletes CiliumNodes, CiliumEndpoints and CiliumIdentities. Only the replica that holds the lease
// lash-operator-resource-lock writes, and it stops writing before it gives the lease up.
package operator
