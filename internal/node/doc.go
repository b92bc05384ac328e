// SPDX-License-Identifier: Apache-2.0

// Package node turns what is known of nodes into what a node needs of them: the merged nodes, the ipcache, the routes to
// other nodes' pods and to services, and warnings. It reads the tables node-objects, local-node, devices, endpoints,
// endpointslices and service-ports, and writes nodes, ipcache, routes and warnings; it touches neither the API server
// nor the kernel.
package node
