// SPDX-License-Identifier: Apache-2.0

// Command services measures what services cost the agent: from the API server's answer through tables and stage to the
// rows of maps in the kernel. It serves objects to the agent's own reflectors from memory and attaches nothing; the maps
// are not pinned and go with the process.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"log"
	"log/slog"
	"net/netip"
	"os"
	"slices"
	"strings"
	"sync/atomic"
	"time"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/rlimit"
	"golang.org/x/sys/unix"
	"k8s.io/client-go/rest"

	"github.com/lash-net/lash/bpf"
	"github.com/lash-net/lash/internal/datapath"
	"github.com/lash-net/lash/internal/k8s"
	"github.com/lash-net/lash/internal/model"
	"github.com/lash-net/lash/internal/reconcile"
	"github.com/lash-net/lash/internal/service"
	"github.com/lash-net/lash/internal/state"
)

func main() {
	log.SetFlags(0)
	services := flag.Int("services", 10000, "services, each with one port, a cluster IP and, one in ten, a NodePort")
	endpoints := flag.Int("endpoints", 10, "endpoints of a service")
	changes := flag.Int("changes", 500, "changes measured one by one")
	maglev := flag.Bool("maglev", false, "Maglev tables for the services with a NodePort")
	flag.Parse()
	if err := run(*services, *endpoints, *changes, *maglev); err != nil {
		log.Fatal("bench-services: ", err)
	}
}

func run(services, endpoints, changes int, maglev bool) error {
	if err := rlimit.RemoveMemlock(); err != nil {
		return err
	}
	quiet := slog.New(slog.DiscardHandler)
	dp, err := datapath.Open(datapath.Config{ServiceMax: uint32(max(65536, 4*services)), ConnMax: 65536, PodCIDRs: []netip.Prefix{netip.MustParsePrefix("10.0.1.0/24")}}, quiet)
	if err != nil {
		return err
	}
	defer dp.Close()
	api, err := serve(services, endpoints)
	if err != nil {
		return err
	}
	defer api.Close()
	client, err := k8s.NewClient(&rest.Config{Host: api.URL})
	if err != nil {
		return err
	}
	tables, err := state.New()
	if err != nil {
		return err
	}
	defer tables.Stop()
	ctx, cancel := context.WithCancel(context.Background())
	defer cancel()

	var written atomic.Int64 // service ports in the kernel
	began, cpu := time.Now(), cpuTime()
	target := dp.ServicePorts()
	known, err := target.List(ctx)
	if err != nil {
		return err
	}
	stage := service.New(tables, service.Config{Node: "n1", IPv4: true, Topology: true, Affinity: true, Maglev: maglev, NodePortFirst: 30000, NodePortLast: 32767, Numbers: service.NewNumbers(known)})
	loop := reconcile.New(reconcile.Config[uint32, model.ServicePort]{
		Name: "datapath-services", Target: target, Desired: state.DesiredChanges(tables.DB, tables.ServicePorts, state.SplitServicePort),
		Equal: datapath.SameServicePort, Throttle: 5 * time.Millisecond, Parallel: 32, Log: quiet,
		Report: func(h reconcile.Health) { written.Store(int64(h.Rows - h.Failing)) },
	})
	for _, r := range k8s.Reflectors(client, tables, "n1", "", quiet) {
		if strings.Contains(r.Name, "Service") || strings.Contains(r.Name, "EndpointSlice") || strings.Contains(r.Name, "Pods") {
			go r.Run(ctx)
		}
	}
	go stage.Run(ctx)
	go loop.Run(ctx)

	for written.Load() < int64(services) {
		if time.Since(began) > 5*time.Minute {
			return fmt.Errorf("only %d of %d service ports after 5 minutes", written.Load(), services)
		}
		time.Sleep(time.Millisecond)
	}
	full, fullCPU := time.Since(began), cpuTime()-cpu
	if err := loop.Sync(ctx); err != nil {
		return err
	}
	fmt.Printf("%d services, %d endpoints each%s; load average %s\n", services, endpoints, map[bool]string{true: ", Maglev", false: ""}[maglev], loadavg())
	fmt.Printf("full load, from the list requests to the last row: %.2f s (CPU %.2f s)\n", full.Seconds(), fullCPU.Seconds())

	var took []time.Duration
	for i := range changes {
		which := i * 7919 % services
		id := number(tables, which)
		addr, at := api.change(which, i)
		key := bpf.MemberKey{Service: id, Addr: bpf.AddrFrom(addr), Port: bpf.ToBE16(8080)}
		for {
			var v uint32
			err := dp.Map("lash_members").Lookup(key, &v)
			if err == nil {
				break
			}
			if !errors.Is(err, ebpf.ErrKeyNotExist) {
				return err
			}
			if time.Since(at) > 10*time.Second {
				return fmt.Errorf("change %d is not visible after 10 s", i)
			}
			time.Sleep(100 * time.Microsecond)
		}
		took = append(took, time.Since(at))
		time.Sleep(5 * time.Millisecond)
	}
	slices.Sort(took)
	fmt.Printf("one change, watch event to map row: p50 %s, p99 %s, max %s of %d\n", at(took, .5), at(took, .99), at(took, 1), len(took))

	began, cpu = time.Now(), cpuTime()
	if known, err = target.List(ctx); err != nil {
		return err
	}
	fmt.Printf("a restart reads %d service ports back: %.2f s (CPU %.2f s)\n", len(known), time.Since(began).Seconds(), (cpuTime() - cpu).Seconds())
	fmt.Printf("process: resident %s (reading, serving and measuring included)\n", resident())
	var total uint64
	for _, m := range dp.Maps() {
		switch m.Name {
		case "lash_services", "lash_backends", "lash_members", "lash_maglev", "lash_ports", "lash_source_ranges":
			n, err := count(dp.Map(m.Name))
			if err != nil {
				return err
			}
			fmt.Printf("  %-20s %8d rows, %8.1f MiB\n", m.Name, n, float64(m.Memory)/(1<<20))
			total += m.Memory
		}
	}
	fmt.Printf("  %-20s %8s       %8.1f MiB\n", "together", "", float64(total)/(1<<20))
	return nil
}

func at(d []time.Duration, q float64) time.Duration {
	return d[min(len(d)-1, int(q*float64(len(d))))].Round(100 * time.Microsecond)
}

// count is the number of rows of a map, by walking its keys.
func count(m *ebpf.Map) (n int, err error) {
	if m.Type() == ebpf.Array {
		return int(m.MaxEntries()), nil
	}
	key := make([]byte, m.KeySize())
	var last any
	for {
		if err := m.NextKey(last, &key); errors.Is(err, ebpf.ErrKeyNotExist) {
			return n, nil
		} else if err != nil {
			return n, err
		}
		n++
		last = slices.Clone(key)
	}
}

// number is that of the service port of a service.
func number(t *state.Tables, which int) uint32 {
	for p := range t.ServicePorts.All(t.DB.ReadTxn()) {
		if p.Name == serviceName(which) {
			return p.ID
		}
	}
	return 0
}

// cpuTime is what the process has used, the server of objects included; on a busy machine it says more than the clock.
func cpuTime() time.Duration {
	var u unix.Rusage
	if err := unix.Getrusage(unix.RUSAGE_SELF, &u); err != nil {
		return 0
	}
	return time.Duration(u.Utime.Nano() + u.Stime.Nano())
}

func resident() string {
	b, err := os.ReadFile("/proc/self/status")
	if err != nil {
		return "unknown"
	}
	for line := range strings.Lines(string(b)) {
		if v, ok := strings.CutPrefix(line, "VmRSS:"); ok {
			return strings.TrimSpace(v)
		}
	}
	return "unknown"
}

func loadavg() string {
	b, err := os.ReadFile("/proc/loadavg")
	if err != nil {
		return "unknown"
	}
	return strings.Fields(string(b))[0]
}
