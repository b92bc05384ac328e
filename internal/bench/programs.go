// SPDX-License-Identifier: Apache-2.0

package bench

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"slices"
	"strings"
	"time"

	"github.com/cilium/ebpf"
	"golang.org/x/sys/unix"
)

// ProgramCost is what the kernel's run statistics say of a program while one
// kind of traffic ran on one path. The kernel's own clock is in the figure.
type ProgramCost struct {
	Path    string  `json:"path"`
	Kind    string  `json:"kind"`
	Family  int     `json:"family"`
	Program string  `json:"program"`
	ID      uint32  `json:"id"`
	NS      float64 `json:"nsPerRun"`
	Runs    float64 `json:"runsPerUnit"` // a unit is an exchange, a connection, or 64 KiB
}

type programRuns struct {
	name  string
	time  time.Duration
	count uint64
}

// snapshot reads the statistics of every program of the kernel.
func snapshot() (map[ebpf.ProgramID]programRuns, error) {
	all := map[ebpf.ProgramID]programRuns{}
	for id := ebpf.ProgramID(0); ; {
		next, err := ebpf.ProgramGetNextID(id)
		if errors.Is(err, fs.ErrNotExist) {
			return all, nil
		}
		if err != nil {
			return nil, fmt.Errorf("list programs: %w", err)
		}
		id = next
		p, err := ebpf.NewProgramFromID(id)
		if err != nil {
			continue // gone meanwhile
		}
		info, err := p.Info()
		if err == nil {
			var s *ebpf.ProgramStats
			if s, err = p.Stats(); err == nil {
				all[id] = programRuns{info.Name, s.Runtime, s.RunCount}
			}
		}
		p.Close()
		if err != nil {
			return nil, fmt.Errorf("statistics of program %d: %w", id, err)
		}
	}
}

// programs measures the programs' own time, in a pass of its own: switched on,
// the statistics cost more than some programs.
func (b *bed) programs(ctx context.Context, o Options) ([]ProgramCost, error) {
	stats, err := ebpf.EnableStats(unix.BPF_STATS_RUN_TIME)
	if err != nil {
		return nil, fmt.Errorf("switch on the kernel's run statistics: %w", err)
	}
	defer stats.Close()
	var costs []ProgramCost
	for _, w := range b.paths {
		for _, kind := range o.Kinds {
			for _, family := range o.Families {
				if !w.carries(kind) {
					continue
				}
				if ctx.Err() != nil {
					return costs, ctx.Err()
				}
				before, err := snapshot()
				if err != nil {
					return costs, err
				}
				client, server, err := b.cell(w, kind, family, 0, o.Cell)
				if err != nil {
					o.Say("%s %s IPv%d: %v", w.Name, kind, family, err)
					continue
				}
				after, err := snapshot()
				if err != nil {
					return costs, err
				}
				units := float64(client.Count)
				if kind == Stream || kind == StreamX {
					units = float64(server.Count) / (64 << 10)
				}
				for _, c := range compare(before, after, units) {
					c.Path, c.Kind, c.Family = w.Name, kind, family
					costs = append(costs, c)
				}
			}
		}
	}
	return costs, nil
}

// compare leaves out what ran too seldom to belong to the traffic.
func compare(before, after map[ebpf.ProgramID]programRuns, units float64) []ProgramCost {
	var costs []ProgramCost
	for id, a := range after {
		b := before[id]
		n := float64(a.count - b.count)
		if n < units/20 || n < 10 {
			continue
		}
		costs = append(costs, ProgramCost{Program: a.name, ID: uint32(id), NS: float64(a.time-b.time) / n, Runs: n / units})
	}
	slices.SortFunc(costs, func(a, b ProgramCost) int {
		if c := strings.Compare(a.Program, b.Program); c != 0 {
			return c
		}
		return int(a.ID) - int(b.ID)
	})
	return costs
}
