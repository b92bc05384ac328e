// SPDX-License-Identifier: Apache-2.0

package cli

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net/netip"

	"github.com/spf13/cobra"

	"github.com/lash-net/lash/api/agent"
)

func (a *app) prefilterCommand() *cobra.Command {
	cmd := group("prefilter", "Sources whose packets the node's devices drop, by XDP", nil,
		listing(a, "list", "List their prefixes", "/v1/prefilter", printPrefilter),
		a.prefilterChange("update", "Drop packets from prefixes", func(p []netip.Prefix) agent.PrefilterChange { return agent.PrefilterChange{Add: p} }),
		a.prefilterChange("delete", "Drop them no longer", func(p []netip.Prefix) agent.PrefilterChange { return agent.PrefilterChange{Remove: p} }))
	cmd.Long = `prefilter drops packets by their source in the drivers of the node's devices, before the kernel spends anything on them. It needs XDP
(loadBalancer.acceleration). What is dropped is counted ('lash bpf metrics list', reason "Policy denied by denylist") and shown by 'lash monitor'. The
list is the node's own, is not told to other nodes, and stays when the agent ends.`
	return cmd
}

func printPrefilter(out io.Writer, prefixes []netip.Prefix) {
	w := columns(out)
	row(w, "CIDR")
	for _, p := range prefixes {
		row(w, p.String())
	}
	w.Flush()
}

func (a *app) prefilterChange(use, short string, change func([]netip.Prefix) agent.PrefilterChange) *cobra.Command {
	var cidrs []string
	cmd := &cobra.Command{
		Use:     use + " --cidr CIDR",
		Short:   short,
		Example: "  lash prefilter " + use + " --cidr 192.0.2.0/24,2001:db8:7::/48",
		Args:    cobra.NoArgs,
	}
	cmd.Flags().StringSliceVar(&cidrs, "cidr", nil, "prefix or address, IPv4 or IPv6; may be given more than once")
	a.outputFlag(cmd)
	cmd.RunE = func(cmd *cobra.Command, args []string) error {
		prefixes, err := parsePrefixes(cidrs)
		if err != nil {
			return err
		}
		return a.onAgent(cmd, args, func(ctx context.Context, c *client) error {
			var now []netip.Prefix
			if err := c.patch(ctx, "/v1/prefilter", change(prefixes), &now); err != nil {
				return err
			}
			if done, err := a.printJSON(now); done || err != nil {
				return err
			}
			printPrefilter(a.Out, now)
			return nil
		})
	}
	return cmd
}

// parsePrefixes wants prefixes without bits behind their length: 10.0.0.1/8 is more often a mistake than not.
func parsePrefixes(texts []string) (out []netip.Prefix, err error) {
	if len(texts) == 0 {
		return nil, errors.New("--cidr is missing: give prefixes, like --cidr 192.0.2.0/24")
	}
	for _, text := range texts {
		p, err := netip.ParsePrefix(text)
		if a, aErr := netip.ParseAddr(text); aErr == nil && a.Zone() == "" {
			p, err = netip.PrefixFrom(a, a.BitLen()), nil
		}
		switch {
		case err != nil:
			return nil, fmt.Errorf("--cidr=%s: must be a prefix or an address, like 192.0.2.0/24 or 2001:db8::1", text)
		case p.Addr().Is4In6():
			return nil, fmt.Errorf("--cidr=%s: write it as IPv4", text)
		case p != p.Masked():
			return nil, fmt.Errorf("--cidr=%s: has bits behind its length: write %s, or %s for the one address", text, p.Masked(), p.Addr())
		}
		out = append(out, p)
	}
	return out, nil
}
