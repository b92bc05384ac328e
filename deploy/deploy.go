// SPDX-License-Identifier: Apache-2.0

// Package deploy holds the Helm chart that installs Lash, embedded as the files in the directory lash.
package deploy

import "embed"

// Chart is the chart; its root directory is lash.
//
//go:embed all:lash
var Chart embed.FS
