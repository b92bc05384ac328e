// SPDX-License-Identifier: Apache-2.0

// Package netdev owns the links, addresses, routes, sysctls and netfilter rules of a node that are Lash's, and knows
// about the devices that are not.
//
// It reads the kernel by netlink and /proc/sys, and writes there only what can be recognised afterwards without
// memory: links carry an alias that begins with "lash:", routes of the node carry protocol 76 or, those to services, 77, the netfilter table is
// called lash. It speaks netlink to netfilter, too: no command has to be on the node. Everything happens in
// the network namespace of a [Host], pods' namespaces excepted, which come as open files.
package netdev
