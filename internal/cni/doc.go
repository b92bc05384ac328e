// SPDX-License-Identifier: Apache-2.0

// Package cni is what the CNI plugin and the agent agree on: the request and the answer that cross the agent's socket,
// their validation, the results of each version of the CNI specification, and the files of a CNI installation.
//
// The plugin is executed for every pod, so this package imports the standard library only, and not even net: the
// socket of the plugin's side is a handful of system calls. The agent's side of the socket is package endpoint.
//
// It reads the environment and standard input of the plugin and the answers of the agent. It writes the CNI result,
// the queue of deletions (see [Deletion]) and, on behalf of the agent, the configuration in /etc/cni/net.d.
package cni
