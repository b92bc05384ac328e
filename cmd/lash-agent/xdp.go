// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/lash-net/lash/internal/state"
)

// accelerate attaches XDP to the devices there are, if it is configured, and takes it from all others. With native, a
// device that cannot is an error.
func (a *agent) accelerate() error {
	a.accelerating.Lock()
	defer a.accelerating.Unlock()
	if a.cfg.LBAcceleration == "disabled" {
		return a.dp.KeepXDP(nil)
	}
	devices := state.Rows(a.tables.DB.ReadTxn(), a.tables.Devices)
	keep := map[int]string{}
	for _, d := range devices {
		keep[d.Ifindex] = d.Name
	}
	if err := a.dp.KeepXDP(keep); err != nil {
		return err
	}
	before := a.slower.Load()
	slower := map[string]string{}
	var errs []error
	for _, d := range devices {
		err := a.dp.AttachXDP(d.Ifindex, d.Name)
		if err != nil {
			slower[d.Name] = err.Error()
			errs = append(errs, fmt.Errorf("bpf-lb-acceleration=native: device %s: %w; leave the device out of 'devices', or set best-effort or disabled", d.Name, err))
		}
		if was, known := reason(before, d.Name); !known || was != slower[d.Name] {
			if err != nil {
				a.log.Warn("no XDP on a device: tc serves it", "device", d.Name, "reason", err)
			} else {
				a.log.Info("XDP serves a device", "device", d.Name)
			}
		}
	}
	a.slower.Store(&slower)
	if a.cfg.LBAcceleration == "native" {
		return errors.Join(errs...)
	}
	return nil
}

// reason is what was known of a device: why it has no XDP, or nothing if it has.
func reason(slower *map[string]string, device string) (why string, known bool) {
	if slower == nil {
		return "", false
	}
	return (*slower)[device], true
}

// keepAccelerated looks again now and then: what a driver can may change without a word from the kernel.
func (a *agent) keepAccelerated() *state.Task {
	return &state.Task{
		Name: "xdp", Inputs: []state.Input{state.From(a.tables.Devices.ToTable())}, Interval: 10 * time.Second,
		Do: func(context.Context) error { return a.accelerate() },
	}
}

// acceleration is the word of the status, and why devices have none.
func (a *agent) acceleration() (word string, not map[string]string) {
	word = map[string]string{"disabled": "Disabled", "native": "Native", "best-effort": "Best-Effort"}[a.cfg.LBAcceleration]
	if slower := a.slower.Load(); slower != nil {
		not = *slower
	}
	return word, not
}
