// SPDX-License-Identifier: Apache-2.0

// Command lash-cni is the CNI plugin: a thin client of the agent's socket, executed for every pod.
package main

import (
	"os"

	"github.com/lash-net/lash/internal/cni"
)

func main() {
	os.Exit(cni.Plugin{Getenv: os.Getenv, Stdin: os.Stdin, Stdout: os.Stdout, Stderr: os.Stderr}.Run())
}
