// SPDX-License-Identifier: Apache-2.0

// Package server answers questions about the running agent: status and tables over a unix socket for the CLI, and
// /healthz on the loopback address for kubelet. It reads tables and what small interfaces tell; what PATCH /v1/config changes is
// changed by Options.
package server
