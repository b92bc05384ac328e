// SPDX-License-Identifier: Apache-2.0

package cli

import (
	"context"
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
	"github.com/lash-net/lash/internal/model"
)

// group is a command that only holds others.
func group(use, short string, aliases []string, sub ...*cobra.Command) *cobra.Command {
	cmd := &cobra.Command{
		Use: use, Short: short, GroupID: "node", Aliases: aliases,
		RunE: func(cmd *cobra.Command, args []string) error {
			if len(args) == 0 {
				return cmd.Help()
			}
			var names []string
			for _, c := range cmd.Commands() {
				names = append(names, c.Name())
			}
			return fmt.Errorf("unknown command %q for %q: it has %s", args[0], cmd.CommandPath(), strings.Join(names, ", "))
		},
	}
	cmd.AddCommand(sub...)
	return cmd
}

// listing is a command that gets path from the agent and prints it as JSON or by print.
func listing[T any](a *app, use, short, path string, print func(io.Writer, T)) *cobra.Command {
	cmd := &cobra.Command{Use: use, Short: short, Args: cobra.NoArgs}
	a.outputFlag(cmd)
	cmd.RunE = func(cmd *cobra.Command, args []string) error {
		return a.onAgent(cmd, args, func(ctx context.Context, c *client) error {
			var v T
			if err := c.get(ctx, path, &v); err != nil {
				return err
			}
			if done, err := a.printJSON(v); done || err != nil {
				return err
			}
			print(a.Out, v)
			return nil
		})
	}
	return cmd
}

func (a *app) endpointCommand() *cobra.Command {
	get := &cobra.Command{
		Use: "get ID", Short: "Show everything about one endpoint", Args: cobra.ExactArgs(1),
		Example: "  lash endpoint get 1066",
		RunE: func(cmd *cobra.Command, args []string) error {
			if n, err := strconv.ParseUint(args[0], 10, 16); err != nil || n == 0 {
				return fmt.Errorf("endpoint %q: must be a number from 1 to 65535, the first column of 'lash endpoint list'", args[0])
			}
			return a.onAgent(cmd, args, func(ctx context.Context, c *client) error {
				var e model.Endpoint
				if err := c.get(ctx, "/v1/endpoints/"+args[0], &e); err != nil {
					return err
				}
				a.output = "json"
				_, err := a.printJSON(e)
				return err
			})
		},
	}
	log := &cobra.Command{
		Use: "log ID", Short: "Show the recent changes of one endpoint", Args: cobra.ExactArgs(1),
		Example: "  lash endpoint log 1066",
	}
	a.outputFlag(log)
	log.RunE = func(cmd *cobra.Command, args []string) error {
		if n, err := strconv.ParseUint(args[0], 10, 16); err != nil || n == 0 {
			return fmt.Errorf("endpoint %q: must be a number from 1 to 65535, the first column of 'lash endpoint list'", args[0])
		}
		return a.onAgent(cmd, args, func(ctx context.Context, c *client) error {
			var changes []agent.EndpointChange
			if err := c.get(ctx, "/v1/endpoints/"+args[0]+"/log", &changes); err != nil {
				return err
			}
			if done, err := a.printJSON(changes); done || err != nil {
				return err
			}
			printEndpointLog(a.Out, changes)
			return nil
		})
	}
	return group("endpoint", "Pods of this node, as the datapath knows them", []string{"endpoints", "ep"},
		listing(a, "list", "List the endpoints", "/v1/endpoints", printEndpoints), get, log)
}

func printEndpointLog(out io.Writer, changes []agent.EndpointChange) {
	w := columns(out)
	row(w, "Timestamp", "Status", "State", "Message")
	for _, c := range changes {
		row(w, c.Time.UTC().Format(time.RFC3339), c.Status, c.State, c.Message)
	}
	w.Flush()
}

func printEndpoints(out io.Writer, eps []model.Endpoint) {
	w := columns(out)
	row(w, "ENDPOINT", "POLICY (ingress)", "POLICY (egress)", "IDENTITY", "LABELS (source:key[=value])", "IPv6", "IPv4", "STATUS", "")
	row(w, "", "ENFORCEMENT", "ENFORCEMENT", "", "", "", "", "", "")
	slices.SortFunc(eps, func(x, y model.Endpoint) int { return int(x.ID) - int(y.ID) })
	for _, e := range eps {
		labels := labelLines(e)
		row(w, strconv.Itoa(int(e.ID)), "Disabled", "Disabled", strconv.Itoa(int(e.Identity)), labels[0], addr(e.IPv6), addr(e.IPv4), e.State, "")
		for _, l := range labels[1:] {
			row(w, "", "", "", "", l, "", "", "", "")
		}
	}
	w.Flush()
}

// labelLines returns at least one line.
func labelLines(e model.Endpoint) []string {
	var lines []string
	for _, key := range slices.Sorted(maps.Keys(e.Labels)) {
		l := key
		if v := e.Labels[key]; v != "" {
			l += "=" + v
		}
		if !strings.Contains(key, ":") {
			l = "k8s:" + l
		}
		lines = append(lines, l)
	}
	if len(lines) == 0 {
		return []string{e.Identity.String()}
	}
	return lines
}

func (a *app) identityCommand() *cobra.Command {
	get := &cobra.Command{
		Use: "get ID", Short: "Show the labels behind one identity", Args: cobra.ExactArgs(1),
		Example: "  lash identity get 28568",
	}
	a.outputFlag(get)
	get.RunE = func(cmd *cobra.Command, args []string) error {
		if _, err := strconv.ParseUint(args[0], 10, 32); err != nil {
			return fmt.Errorf("identity %q: must be a number, the first column of 'lash identity list'", args[0])
		}
		return a.onAgent(cmd, args, func(ctx context.Context, c *client) error {
			var id agent.Identity
			if err := c.get(ctx, "/v1/identities/"+args[0], &id); err != nil {
				return err
			}
			if done, err := a.printJSON(id); done || err != nil {
				return err
			}
			printIdentities(a.Out, []agent.Identity{id})
			return nil
		})
	}
	return group("identity", "Identities of the cluster: numbers and the labels behind them", []string{"identities", "id"},
		listing(a, "list", "List the identities", "/v1/identities", printIdentities), get)
}

func printIdentities(out io.Writer, ids []agent.Identity) {
	w := columns(out)
	row(w, "ID", "LABELS")
	for _, id := range ids {
		labels := id.Labels
		if len(labels) == 0 {
			labels = []string{""}
		}
		row(w, strconv.FormatUint(uint64(id.ID), 10), labels[0])
		for _, l := range labels[1:] {
			row(w, "", l)
		}
	}
	w.Flush()
}

func (a *app) ipCommand() *cobra.Command {
	return group("ip", "Addresses of the cluster and their identities", []string{"ips"},
		listing(a, "list", "List the addresses", "/v1/ip", printIPs))
}

func printIPs(out io.Writer, ips []agent.IP) {
	w := columns(out)
	row(w, "IP", "IDENTITY", "SOURCE")
	for _, ip := range ips {
		labels := ip.Labels
		if len(labels) == 0 {
			labels = []string{ip.Identity.String()}
		}
		row(w, ip.Prefix.String(), labels[0], ip.Source)
		for _, l := range labels[1:] {
			row(w, "", l, "")
		}
	}
	w.Flush()
}

func (a *app) nodeCommand() *cobra.Command {
	return group("node", "Nodes of the cluster", []string{"nodes"},
		listing(a, "list", "List the nodes", "/v1/nodes", printNodes))
}

func printNodes(out io.Writer, nodes []model.Node) {
	w := columns(out)
	row(w, "Name", "IPv4 Address", "Endpoint CIDR", "IPv6 Address", "Endpoint CIDR", "Source")
	slices.SortFunc(nodes, func(x, y model.Node) int { return strings.Compare(x.Name, y.Name) })
	for _, n := range nodes {
		var addr4, addr6, cidr4, cidr6 string
		for _, x := range slices.Backward(n.Addrs) {
			if x.Is4() {
				addr4 = x.String()
			} else {
				addr6 = x.String()
			}
		}
		for _, p := range slices.Backward(n.PodCIDRs) {
			if p.Addr().Is4() {
				cidr4 = p.String()
			} else {
				cidr6 = p.String()
			}
		}
		source := n.Source
		if n.Local {
			source = "local"
		}
		row(w, n.Name, addr4, cidr4, addr6, cidr6, source)
	}
	w.Flush()
}

func (a *app) serviceCommand() *cobra.Command {
	get := &cobra.Command{
		Use: "get ID|NAMESPACE/NAME|FRONTEND", Short: "Show everything about one service", Args: cobra.ExactArgs(1),
		Example: "  lash service get default/kubernetes\n  lash service get 10.96.0.1:443/TCP",
		RunE: func(cmd *cobra.Command, args []string) error {
			return a.onAgent(cmd, args, func(ctx context.Context, c *client) error {
				var all []agent.Service
				if err := c.get(ctx, "/v1/services", &all); err != nil {
					return err
				}
				var found []agent.Service
				for _, s := range all {
					if slices.Contains([]string{strconv.Itoa(int(s.ID)), s.Namespace + "/" + s.Name, s.Frontend, strings.Split(s.Frontend, "/")[0]}, args[0]) {
						found = append(found, s)
					}
				}
				if len(found) == 0 {
					return fmt.Errorf("service %q: there is none with this number, namespace/name or frontend; 'lash service list' shows those there are", args[0])
				}
				a.output = "json"
				_, err := a.printJSON(found)
				return err
			})
		},
	}
	return group("service", "Services and their backends", []string{"services", "svc"},
		listing(a, "list", "List the services", "/v1/services", printServices), get)
}

// lbCommand lists the maps of services.
func (a *app) lbCommand() *cobra.Command {
	return a.mapCommand("lb", "Services and their backends", map[string]string{
		"backends": "backends by slot, and those that keep their connections only", "maglev": "how Maglev tables are shared out",
		"affinity": "which backend clients have", "source-ranges": "sources that are let in, or kept out",
	})
}

// mapCommand lists a map, or what a flag says of it.
func (a *app) mapCommand(name, short string, flags map[string]string) *cobra.Command {
	list := &cobra.Command{Use: "list", Short: short, Args: cobra.NoArgs}
	a.outputFlag(list)
	kinds := slices.Sorted(maps.Keys(flags))
	chosen := map[string]*bool{}
	for _, k := range kinds {
		chosen[k] = list.Flags().Bool(k, false, flags[k])
	}
	list.MarkFlagsMutuallyExclusive(kinds...)
	list.RunE = func(cmd *cobra.Command, args []string) error {
		path := "/v1/bpf/" + name
		for _, k := range kinds {
			if *chosen[k] {
				path += "-" + k
			}
		}
		return a.onAgent(cmd, args, func(ctx context.Context, c *client) error {
			var t agent.Table
			if err := c.get(ctx, path, &t); err != nil {
				return err
			}
			if done, err := a.printJSON(t); done || err != nil {
				return err
			}
			printTable(a.Out, t)
			return nil
		})
	}
	return group(name, short, nil, list)
}

func printServices(out io.Writer, services []agent.Service) {
	w := columns(out)
	row(w, "ID", "Frontend", "Service Type", "Backend", "")
	slices.SortFunc(services, func(x, y agent.Service) int { return int(x.ID) - int(y.ID) })
	for _, s := range services {
		first := []string{strconv.Itoa(int(s.ID)), s.Frontend, s.Type}
		if len(s.Backends) == 0 {
			row(w, append(first, "", "")...)
		}
		for i, b := range s.Backends {
			text := fmt.Sprintf("%d => %s/%s (%s)", i+1, netip.AddrPortFrom(b.Addr, b.Port), model.ProtoName(b.Proto), b.State)
			row(w, append(slices.Clone(first), text, "")...)
			first = []string{"", "", ""}
		}
	}
	w.Flush()
}

func (a *app) bpfCommand() *cobra.Command {
	var subs []*cobra.Command
	for _, m := range []struct{ name, short string }{
		{"net", "Programs and where they are attached"},
		{"endpoint", "Local addresses"},
		{"device", "Devices of pods and of the node"},
		{"ct", "Connections"},
		{"ipcache", "Identities and nodes of addresses"},
		{"tunnel", "Pod CIDRs that packets are encapsulated to, and the nodes that have them"},
		{"ipmasq", "Destinations outside of the cluster that are not masqueraded to either"},
		{"socket", "Sockets that asked for a service, and the backend they got"},
		{"metrics", "Packets forwarded and dropped, by reason"},
	} {
		subs = append(subs, group(m.name, m.short, nil, listing(a, "list", m.short, "/v1/bpf/"+m.name, printTable)))
	}
	subs = append(subs, a.lbCommand(), a.mapCommand("nat", "Translated connections", map[string]string{
		"top": "how many source ports each destination takes, of whom, and where there was none left",
	}))
	for _, s := range subs {
		s.GroupID = ""
	}
	return group("bpf", "Maps and programs in the kernel", nil, subs...)
}

func (a *app) dbCommand() *cobra.Command {
	show := &cobra.Command{
		Use: "show TABLE", Short: "Show the rows of one table", Args: cobra.ExactArgs(1), Example: "  lash db show routes",
	}
	a.outputFlag(show)
	show.RunE = func(cmd *cobra.Command, args []string) error {
		if strings.ContainsAny(args[0], "/?#%") {
			return fmt.Errorf("table %q: must be one of those 'lash db list' shows", args[0])
		}
		return a.onAgent(cmd, args, func(ctx context.Context, c *client) error {
			var t agent.Table
			if err := c.get(ctx, "/v1/db/"+args[0], &t); err != nil {
				return err
			}
			if done, err := a.printJSON(t); done || err != nil {
				return err
			}
			printTable(a.Out, t)
			return nil
		})
	}
	list := listing(a, "list", "List the tables", "/v1/db", func(out io.Writer, tables []agent.TableInfo) {
		w := columns(out)
		row(w, "TABLE", "ROWS", "COMPLETE")
		for _, t := range tables {
			row(w, t.Name, strconv.Itoa(t.Rows), strconv.FormatBool(t.Complete))
		}
		w.Flush()
	})
	return group("db", "The agent's tables: everything it knows", nil, list, show)
}

func printTable(out io.Writer, t agent.Table) {
	w := columns(out)
	row(w, append(slices.Clone(t.Columns), "")...)
	for _, r := range t.Rows {
		row(w, append(slices.Clone(r), "")...)
	}
	w.Flush()
}

func addr(a netip.Addr) string {
	if !a.IsValid() {
		return ""
	}
	return a.String()
}
