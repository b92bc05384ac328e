// SPDX-License-Identifier: Apache-2.0

package cli

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"maps"
	"net/netip"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/lash-net/lash/api/agent"
)

func (a *app) statusCommand() *cobra.Command {
	var verbose, why, brief, wait bool
	var waitFor time.Duration
	cmd := &cobra.Command{
		Use:     "status",
		Short:   "Show whether the agent works, and how it forwards packets",
		GroupID: "node",
		Args:    cobra.NoArgs,
		Long: `Show whether the agent works, and how it forwards packets. The exit status is 0 if the agent is ready.

"Host Routing: BPF" is the fast path; with "Legacy" the reason stands beside it, and --why shows each requirement, what was
found, and what would change it.`,
		Example: `  lash status --wait                   wait until agents and operator are ready on all nodes
  lash status --why                    what decides between BPF and Legacy host routing
  lash status --verbose --node node-2  everything about one node
  lash status --brief                  one word, for scripts`,
	}
	cmd.Flags().BoolVarP(&verbose, "verbose", "v", false, "addresses, devices, controllers, maps and details too")
	cmd.Flags().BoolVar(&why, "why", false, "the requirements of BPF host routing, one by one")
	cmd.Flags().BoolVar(&brief, "brief", false, "one line")
	cmd.Flags().BoolVar(&wait, "wait", false, "wait until agents and operator are ready on the whole cluster")
	cmd.Flags().DurationVar(&waitFor, "wait-duration", 5*time.Minute, "how long --wait waits")
	cmd.MarkFlagsMutuallyExclusive("why", "brief", "verbose")
	a.outputFlag(cmd)
	cmd.RunE = func(cmd *cobra.Command, args []string) error {
		if wait {
			k, err := a.cluster()
			if err != nil {
				return err
			}
			if err := k.waitReady(cmd.Context(), a.namespace, waitFor, a.Err); err != nil {
				return err
			}
		}
		return a.onAgent(cmd, args, func(ctx context.Context, c *client) error {
			var s agent.Status
			path := "/v1/status"
			switch {
			case why:
				path += "?why"
			case verbose || a.output == "json":
				path += "?nodes"
			}
			if err := c.get(ctx, path, &s); err != nil {
				return err
			}
			done, err := a.printJSON(s)
			switch {
			case done || err != nil:
			case brief:
				printBrief(a.Out, &s)
			case why:
				printWhy(a.Out, &s)
			default:
				printStatus(a.Out, &s, verbose)
			}
			if err == nil && !s.Ready {
				return errSilent
			}
			return err
		})
	}
	return cmd
}

func printBrief(out io.Writer, s *agent.Status) {
	if s.Ready {
		fmt.Fprintln(out, "OK")
		return
	}
	fmt.Fprintln(out, "not ready:", s.NotReady)
}

func printWhy(out io.Writer, s *agent.Status) {
	fmt.Fprintln(out, "Host Routing:", hostRouting(s))
	fmt.Fprintln(out)
	w := columns(out)
	row(w, "REQUIREMENT", "MET", "FOUND", "NEEDED", "SET BY", "TO CHANGE IT")
	for _, r := range s.Why {
		met := "no"
		if r.Met {
			met = "yes"
		}
		row(w, r.Requirement, met, orDash(r.Found), orDash(r.Needed), orDash(r.SetBy), orDash(r.Change))
	}
	w.Flush()
}

// printStatus prints the lines users know, in the order they know.
func printStatus(out io.Writer, s *agent.Status, verbose bool) {
	w := columns(out)
	line := func(label string, cells ...string) { row(w, append([]string{label + ":"}, cells...)...) }
	// A table within the lines is aligned by itself.
	table := func(print func(io.Writer)) {
		w.Flush()
		tw := columns(out)
		print(tw)
		tw.Flush()
	}
	component := func(label string, c agent.Component) { line(label, c.State, c.Message) }
	// A component that has one thing to say is one cell wide, so that it does not widen the column of the others.
	short := func(label string, c agent.Component) {
		if c.Message == "" {
			line(label, c.State)
			return
		}
		component(label, c)
	}

	component("KVStore", s.KVStore)
	component("Kubernetes", s.Kubernetes)
	if len(s.KubernetesAPIs) > 0 {
		var quoted []string
		for _, api := range s.KubernetesAPIs {
			b, _ := json.Marshal(api)
			quoted = append(quoted, string(b))
		}
		line("Kubernetes APIs", "["+strings.Join(quoted, ", ")+"]")
	}
	kpr := s.KubeProxyReplacement
	if len(kpr.Devices) > 0 {
		line("KubeProxyReplacement", kpr.Mode, "["+devices(kpr.Devices)+"]")
	} else {
		line("KubeProxyReplacement", kpr.Mode)
	}
	short("Host firewall", s.HostFirewall)
	short("SRv6", s.SRv6)
	line("CNI Chaining", s.CNIChaining)
	line("CNI Config file", s.CNIConfigFile)
	component("Lash", s.Lash)
	if m := s.NodeMonitor; m.State == agent.StateOk {
		line("NodeMonitor", m.Message)
		if n := s.Monitor; verbose || n.Lost+n.Missed+n.Unknown > 0 {
			row(w, "", fmt.Sprintf("%d listeners, %d events seen, %d events lost, %d missed by slow listeners, %d unknown notifications", n.Listeners, n.Seen, n.Lost, n.Missed, n.Unknown))
		}
	} else {
		short("NodeMonitor", m)
	}
	short("Lash health daemon", s.HealthDaemon)
	line("IPAM", ipam(s.IPAM))
	if verbose {
		row(w, "Allocated addresses:")
		for _, al := range s.IPAM.Allocations {
			row(w, fmt.Sprintf("  %s (%s)", al.Addr, al.Owner))
		}
	}
	short("IPv4 BIG TCP", s.IPv4BigTCP)
	short("IPv6 BIG TCP", s.IPv6BigTCP)
	short("BandwidthManager", s.BandwidthManager)
	line("Host Routing", hostRouting(s))
	line("Routing", fmt.Sprintf("Network: %s   Host: %s", s.Routing.Network, s.Routing.Host))
	line("Attach Mode", s.AttachMode)
	line("Device Mode", s.DeviceMode)
	masquerading(line, s.Masquerading)
	if verbose {
		line("Clock Source for BPF", s.ClockSource)
	}
	healthy := 0
	for _, c := range s.Controllers {
		if c.Healthy() {
			healthy++
		}
	}
	line("Controller Status", fmt.Sprintf("%d/%d healthy", healthy, len(s.Controllers)))
	table(func(tw io.Writer) { controllers(tw, s, verbose) })
	short("Proxy Status", s.Proxy)
	line("Global Identity Range", fmt.Sprintf("min %d, max %d", s.IdentityRange.Min, s.IdentityRange.Max))
	short("Hubble", s.Hubble)
	if verbose {
		table(func(tw io.Writer) { kprDetails(tw, kpr) })
		line("Sockmap", sockmap(s.Sockmap)...)
		table(func(tw io.Writer) { bpfMaps(tw, s.BPFMaps) })
	}
	if verbose {
		table(func(tw io.Writer) {
			row(tw, "Encryption:", s.Encryption.State)
			printClusterHealth(tw, s.ClusterHealth, healthVerbose)
		})
	} else {
		short("Encryption", s.Encryption)
		printClusterHealth(w, s.ClusterHealth, healthFailing)
	}
	w.Flush()

	w = columns(out)
	fmt.Fprintf(w, "Managed Pods:\t%d/%d\n", s.ManagedPods.Managed, s.ManagedPods.Total)
	for _, p := range s.ManagedPods.Unmanaged {
		row(w, "  not managed by Lash, it ran before the agent: "+p)
	}
	if verbose {
		fmt.Fprintf(w, "MTU:\tdevice %d, route %d\t%s\n", s.MTU.Device, s.MTU.Route, s.MTU.Reason)
		row(w, "Devices:")
		for _, d := range s.Devices {
			row(w, "  "+d.Name, fmt.Sprintf("mtu %d", d.MTU), prefixes(d.Addrs), d.Reason)
		}
	}
	for _, text := range s.Warnings {
		row(w, "Warning:", text)
	}
	for _, o := range s.Objects {
		row(w, "Warning:", fmt.Sprintf("%s %s, %s: %s", o.Kind, o.Name, o.Field, o.Error))
	}
	if !s.Ready {
		row(w, "Not ready:", s.NotReady)
	}
	w.Flush()
}

func hostRouting(s *agent.Status) string {
	if s.Routing.Reason == "" {
		return s.Routing.Host
	}
	return s.Routing.Host + " (" + s.Routing.Reason + ")"
}

func devices(list []agent.Device) string {
	var out []string
	for _, d := range list {
		text := d.Name + " "
		for _, a := range []netip.Addr{d.IPv4, d.IPv6} {
			if a.IsValid() {
				text += " " + a.String()
			}
		}
		if d.DirectRouting {
			text += " (Direct Routing)"
		}
		out = append(out, text)
	}
	return strings.Join(out, ", ")
}

func ipam(i agent.IPAM) string {
	if len(i.Pools) == 0 {
		return i.Message
	}
	var b strings.Builder
	for n, p := range i.Pools {
		if n > 0 {
			b.WriteString(" ")
		}
		fmt.Fprintf(&b, "%s: %d/%d allocated from %s,", p.Family, p.Allocated, p.Total, prefixes(p.CIDRs))
	}
	return b.String() + " "
}

func masquerading(line func(string, ...string), m agent.Masquerading) {
	families := fmt.Sprintf("[IPv4: %s, IPv6: %s]", enabled(m.IPv4), enabled(m.IPv6))
	if m.Mode == agent.StateDisabled {
		line("Masquerading", m.Mode)
		return
	}
	var v4, v6 []string
	for _, e := range m.Excluded {
		if strings.Contains(e, ":") {
			v6 = append(v6, e)
		} else {
			v4 = append(v4, e)
		}
	}
	line("Masquerading", m.Mode, "["+strings.Join(m.Devices, ", ")+"]", strings.Join(v4, ",")+" "+strings.Join(v6, ",")+" "+families)
}

func controllers(w io.Writer, s *agent.Status, verbose bool) {
	var rows []agent.Controller
	for _, c := range s.Controllers {
		if verbose || !c.Healthy() {
			rows = append(rows, c)
		}
	}
	if len(rows) == 0 {
		return
	}
	slices.SortFunc(rows, func(x, y agent.Controller) int { return strings.Compare(x.Name, y.Name) })
	ago := func(t *time.Time) string {
		if t == nil {
			return "never"
		}
		return s.Now.Sub(*t).Truncate(time.Second).String() + " ago"
	}
	row(w, "  Name", "Last success", "Last error", "Count", "Message", "")
	for _, c := range rows {
		message := c.Message
		if message == "" {
			message = "no error"
		}
		row(w, "  "+c.Name, ago(c.LastSuccess), ago(c.LastError), strconv.FormatUint(c.Count, 10), message, "")
	}
}

func sockmap(m agent.Sockmap) []string {
	if m.Pods == 0 {
		reason := m.Reason
		if reason == "" {
			reason = "no pod of this node asks for it (annotation lash.io/sockmap)"
		}
		return []string{"Disabled", reason}
	}
	return []string{"Enabled", fmt.Sprintf("%d pods, %d messages (%.1f MiB) without packets, %d directions too busy for it", m.Pods, m.Messages, float64(m.Bytes)/(1<<20), m.Bulk)}
}

func kprDetails(w io.Writer, k agent.KubeProxyReplacement) {
	row(w, "KubeProxyReplacement Details:")
	detail := func(label, value string) {
		if value != "" {
			row(w, "  "+label+":", value)
		}
	}
	detail("Status", k.Mode)
	detail("Socket LB", k.SocketLB)
	detail("Socket LB Tracing", k.SocketLBTracing)
	detail("Socket LB Coverage", k.SocketLBCoverage)
	detail("Devices", devices(k.Devices))
	detail("Mode", k.LBMode)
	detail("DSR Dispatch Mode", k.DSRDispatch)
	detail("Backend Selection", k.BackendSelection)
	detail("Session Affinity", k.SessionAffinity)
	detail("NAT46/64 Support", k.NAT46)
	detail("XDP Acceleration", k.XDPAcceleration)
	for _, device := range slices.Sorted(maps.Keys(k.NotAccelerated)) {
		detail("- "+device, "by tc: "+k.NotAccelerated[device])
	}
	row(w, "  Services:")
	for _, f := range k.Services {
		text := f.State
		if f.Note != "" {
			text += " (" + f.Note + ")"
		}
		row(w, "  - "+f.Name+":", text)
	}
	if len(k.Annotations) > 0 {
		row(w, "  Annotations:")
		for _, a := range k.Annotations {
			row(w, "  - "+a)
		}
	}
}

func bpfMaps(w io.Writer, maps []agent.BPFMap) {
	if len(maps) == 0 {
		return
	}
	row(w, "BPF Maps:")
	row(w, "  Name", "Size", "Entries", "Memory", "")
	for _, m := range maps {
		entries, memory := "-", "-"
		if m.Entries >= 0 {
			entries = strconv.Itoa(m.Entries)
		}
		if m.Memory > 0 {
			memory = fmt.Sprintf("%.1f MiB", float64(m.Memory)/(1<<20))
		}
		row(w, "  "+m.Name, strconv.FormatUint(uint64(m.Size), 10), entries, memory, "")
	}
}

func prefixes(list []netip.Prefix) string {
	var out []string
	for _, p := range list {
		out = append(out, p.String())
	}
	return strings.Join(out, ", ")
}

func enabled(b bool) string {
	if b {
		return "Enabled"
	}
	return "Disabled"
}

func orDash(s string) string {
	if s == "" {
		return "-"
	}
	return s
}
