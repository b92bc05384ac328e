// SPDX-License-Identifier: Apache-2.0

package main

import "time"

// Spec is what the host tells the guest: /spec.json of the initial RAM disk.
type Spec struct {
	Release  string   // kernel release, the name of its module directory
	ModDir   string   // module directory as a path below the host's root
	Modules  []string // files below /modules of the RAM disk, in loading order
	Shares   []Share  // the first one is the root
	Steps    []Step
	Hostname string
}

// Share is one directory of the host as the guest mounts it.
type Share struct {
	Tag      string // virtiofs tag
	Dir      string // mount point, the same path on both sides
	Writable bool   // writes reach the host; otherwise they stay in the guest
}

// Step is one command to run in the guest.
type Step struct {
	Name    string
	Dir     string
	Argv    []string
	Env     []string
	Timeout time.Duration // the guest kills the step's processes past it
}

// Event is one line of the guest's control channel.
type Event struct {
	Kind   string  // "up", "start", "end", "fail"
	Step   int     `json:",omitempty"`
	Status int     `json:",omitempty"` // of "end": as a shell reports it, 124 on timeout
	Uptime float64 `json:",omitempty"` // seconds since the guest's boot
	Text   string  `json:",omitempty"`
}

// Exit statuses of this program that are not the command's own.
const (
	exitTimeout   = 124
	exitDied      = 125 // the machine ended before the command did
	exitCannotRun = 126
)

// portName is the virtio port of the guest's frames.
const portName = "lash.frames"
