// SPDX-License-Identifier: Apache-2.0

package cli

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"net/netip"
	"strconv"
	"strings"

	"github.com/spf13/cobra"

	"github.com/lash-net/lash/api/agent"
)

func (a *app) explainCommand() *cobra.Command {
	var req agent.ExplainRequest
	var v4, v6, verbose bool
	var source, event string
	var ttl uint8
	cmd := &cobra.Command{
		Use:     "explain SRC DST[:PORT[/PROTO]]",
		Short:   "Tell what becomes of a packet, and what decides it",
		GroupID: "node",
		Args:    cobra.MaximumNArgs(2),
		Long: `explain runs the nodes' own programs on a packet that is never sent, and tells step by step which program and which map entry
decides, what is behind that entry, what is rewritten and where the packet leaves. Nothing is changed: what programs would write goes to
copies. Where the packet reaches another node, that node's agent is asked to go on. What a node's IP stack does is its routing table's
answer; netfilter is not asked.

SRC and DST are each a pod (NAMESPACE/NAME or pod/NAMESPACE/NAME), a service (svc/NAMESPACE/NAME or NAME.NAMESPACE.svc), a node (its name
or node/NAME) or an address. Without a port the packet is an ICMP echo; PROTO is tcp, udp or sctp, and tcp if left out. A packet from a
node is one of its processes' or of a pod in its network; one from an address outside of the cluster arrives at the node of DST or at --node.

It is explained as the first one of a connection, or with --source-port as the next one of a connection that is known, if it is.`,
		Example: `  lash explain default/client default/web-0:8080
  lash explain default/client svc/default/web:80 --all
  lash explain worker-1 web.default.svc:80/tcp -o json
  lash monitor --type drop -o json | head -1 | lash explain --from-event -`,
	}
	a.outputFlag(cmd)
	f := cmd.Flags()
	f.Uint16Var(&req.SourcePort, "source-port", 0, "source port, or identifier of an ICMP echo: explain that connection")
	f.BoolVar(&req.Fresh, "fresh", false, "as a new connection, whatever is known of it")
	f.StringVar(&source, "source-ip", "", "address the pod puts into the packet instead of its own")
	f.BoolVarP(&v4, "ipv4", "4", false, "by IPv4")
	f.BoolVarP(&v6, "ipv6", "6", false, "by IPv6")
	f.Uint8Var(&ttl, "ttl", 64, "TTL or hop limit")
	f.IntVar(&req.Size, "size", 0, "bytes of payload")
	f.BoolVar(&req.All, "all", false, "for every backend of a service, not one")
	f.StringVar(&req.Node, "at", "", "node where a packet from outside of the cluster arrives (default: DST's)")
	f.StringVar(&event, "from-event", "", "a packet that 'lash monitor' showed: its line, with or without -o json; - reads it")
	f.BoolVarP(&verbose, "verbose", "v", false, "also the connection's record, the events it would make and the programs' tags")
	cmd.MarkFlagsMutuallyExclusive("ipv4", "ipv6")
	cmd.RunE = func(cmd *cobra.Command, args []string) (err error) {
		var seen seenEvent
		switch {
		case event != "" && len(args) > 0:
			return errors.New("--from-event names both ends: leave out SRC and DST")
		case event != "":
			if event == "-" {
				line, err := bufio.NewReader(io.LimitReader(a.In, 1<<20)).ReadString('\n')
				if err != nil && err != io.EOF {
					return fmt.Errorf("--from-event: %w", err)
				}
				if err := cmd.Flags().Set("from-event", strings.TrimSpace(line)); err != nil { // for the command in an agent's pod
					return err
				}
			}
			if seen, err = parseEvent(event); err != nil {
				return fmt.Errorf("--from-event: %w", err)
			}
			seen.fill(&req)
		case len(args) < 2:
			return fmt.Errorf("both ends must be named: %s", cmd.UseLine())
		default:
			req.Src = args[0]
			if req.Dst, req.Port, req.Proto, err = parseDst(args[1]); err != nil {
				return err
			}
		}
		if source != "" {
			if req.SourceIP, err = netip.ParseAddr(source); err != nil {
				return fmt.Errorf("--source-ip=%s: must be an address", source)
			}
		}
		if v4 {
			req.Family = 4
		}
		if v6 {
			req.Family = 6
		}
		if req.TTL = ttl; ttl == 0 {
			return errors.New("--ttl=0: must be 1 to 255")
		}
		return a.onAgent(cmd, args, func(ctx context.Context, c *client) error {
			var out agent.Explanation
			if err := c.post(ctx, "/v1/explain", req, &out); err != nil {
				return err
			}
			if done, err := a.printJSON(out); done || err != nil {
				return err
			}
			for i, way := range out.Ways {
				if i > 0 {
					fmt.Fprintln(a.Out)
				}
				if err := printWay(a.Out, way, verbose); err != nil {
					return err
				}
				seen.compare(a.Out, way.Verdict)
			}
			return nil
		})
	}
	return cmd
}

// parseDst reads DST[:PORT[/PROTO]]. An IPv6 address with a port is in brackets.
func parseDst(s string) (dst string, port uint16, proto string, err error) {
	if _, err := netip.ParseAddr(s); err == nil {
		return s, 0, "", nil
	}
	i := strings.LastIndexByte(s, ':')
	if strings.HasPrefix(s, "[") {
		end := strings.IndexByte(s, ']')
		if end < 0 {
			return "", 0, "", fmt.Errorf("%s: the bracket is not closed", s)
		}
		if i = end + 1; i == len(s) {
			return s[1:end], 0, "", nil
		}
	}
	if i < 0 {
		return s, 0, "", nil
	}
	dst = strings.Trim(s[:i], "[]")
	number, proto, _ := strings.Cut(s[i+1:], "/")
	n, err := strconv.ParseUint(number, 10, 16)
	if err != nil || n == 0 {
		return "", 0, "", fmt.Errorf("%s: %q is no port from 1 to 65535; write DST:PORT/PROTO, an IPv6 address in brackets", s, number)
	}
	switch proto {
	case "", "tcp", "udp", "sctp":
	default:
		return "", 0, "", fmt.Errorf("%s: protocol %q must be tcp, udp or sctp; an ICMP echo has no port", s, proto)
	}
	return dst, uint16(n), proto, nil
}

// printWay prints what decided, an asterisk before the entry that did, and the verdict last.
func printWay(out io.Writer, way agent.ExplainedWay, verbose bool) error {
	w := columns(out)
	fmt.Fprintf(w, "%s -> %s\n\n", endText(way.Src), endText(way.Dst))
	for _, s := range way.Steps {
		where := s.Program
		if s.Device != "" {
			where += " on " + s.Device
		}
		fmt.Fprintf(w, "%s, %s\n", s.Node, where)
		if s.Packet != "" {
			fmt.Fprintf(w, "    %s\n", s.Packet)
		}
		for _, why := range s.Why {
			fmt.Fprintf(w, "    %s\n", why)
		}
		for _, e := range s.Entries {
			mark := "   "
			if e.Decides {
				mark = "  *"
			}
			cells := []string{mark + " " + e.Map, e.Key, e.Value}
			if e.Object != "" {
				cells = append(cells, e.Object)
			}
			row(w, cells...)
		}
		if len(s.Changes) > 0 {
			fmt.Fprintf(w, "    rewritten: %s\n", strings.Join(s.Changes, ", "))
		}
		if verbose {
			printDetails(w, s)
		}
		fmt.Fprintf(w, "    => %s\n", s.Result)
	}
	v := way.Verdict
	fmt.Fprintf(w, "\nVerdict:\t%s\n", v.Text)
	if v.Remedy != "" {
		fmt.Fprintf(w, "Remedy:\t%s\n", v.Remedy)
	}
	return w.Flush()
}

func printDetails(w io.Writer, s agent.ExplainStep) {
	if s.Tag != "" {
		fmt.Fprintf(w, "    program tag %s, as attached\n", s.Tag)
	}
	if r := s.Record; r != nil {
		nat := ""
		if r.NAT != "" {
			nat = ", masqueraded as " + r.NAT
		}
		if r.Backend != "" {
			nat += ", served by " + r.Backend
		}
		fmt.Fprintf(w, "    connection %s%s: %s\n      forth: %s\n      back:  %s\n", r.Connection, nat, r.State, r.Forth, r.Back)
	}
	for _, p := range s.Points {
		fmt.Fprintf(w, "    event: %s\n", p)
	}
}

func endText(e agent.ExplainedEnd) string {
	if e.Object == "" {
		return e.Addr.String() + " (outside of the cluster)"
	}
	s := fmt.Sprintf("%s (%s)", e.Object, e.Addr)
	if e.Node != "" && !strings.HasSuffix(e.Object, "node "+e.Node) {
		s += " on " + e.Node
	}
	return s
}
