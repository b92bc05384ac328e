// SPDX-License-Identifier: Apache-2.0

package cli

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"strconv"
	"strings"

	"github.com/spf13/cobra"

	"github.com/lash-net/lash/api/agent"
	"github.com/lash-net/lash/internal/monitor"
)

// monitorFlags are those of `lash monitor`.
type monitorFlags struct {
	verbose           int
	hex, numeric      bool
	json              bool
	types             []string
	from, to, related []uint
	untilInputEnds    bool
}

func (a *app) monitorCommand() *cobra.Command {
	var f monitorFlags
	cmd := &cobra.Command{
		Use:     "monitor",
		Short:   "Show what happens to packets on a node, as it happens",
		GroupID: "node",
		Args:    cobra.NoArgs,
		Long: `monitor shows which packets a node forwards and drops, and why, until it is interrupted.

Of an established connection only some packets are told about; 'lash config MonitorAggregationLevel=None' makes that all of them, and
'lash config Debug=Enabled' adds how each was decided.`,
		Example: `  lash monitor --type drop
  lash monitor -vv --related-to 1066`,
	}
	a.outputFlag(cmd)
	flags := cmd.Flags()
	flags.CountVarP(&f.verbose, "verbose", "v", "debugging, too; twice: and the headers of each packet")
	flags.BoolVar(&f.hex, "hex", false, "with -vv: packets as bytes")
	flags.BoolVar(&f.numeric, "numeric", false, "identities and devices as numbers")
	flags.BoolVarP(&f.json, "json", "j", false, "the same as -o json")
	flags.StringSliceVarP(&f.types, "type", "t", nil, "only these types: "+strings.Join(monitor.Types, ", "))
	flags.UintSliceVar(&f.from, "from", nil, "only from these endpoints")
	flags.UintSliceVar(&f.to, "to", nil, "only to these endpoints")
	flags.UintSliceVar(&f.related, "related-to", nil, "only from or to these endpoints")
	flags.BoolVar(&f.untilInputEnds, "until-input-ends", false, "")
	_ = flags.MarkHidden("until-input-ends")
	_ = cmd.RegisterFlagCompletionFunc("type", cobra.FixedCompletions(monitor.Types, cobra.ShellCompDirectiveNoFileComp))
	cmd.RunE = func(cmd *cobra.Command, args []string) error {
		filter := monitor.Filter{Types: f.types}
		for _, ids := range []struct {
			name string
			in   []uint
			out  *[]uint16
		}{{"from", f.from, &filter.From}, {"to", f.to, &filter.To}, {"related-to", f.related, &filter.Related}} {
			for _, id := range ids.in {
				if id == 0 || id > 0xffff {
					return fmt.Errorf("--%s=%d: must be the number of an endpoint, 1 to 65535; 'lash endpoint list' shows them", ids.name, id)
				}
				*ids.out = append(*ids.out, uint16(id))
			}
		}
		if err := filter.Check(); err != nil {
			return err
		}
		return a.onAgent(cmd, args, func(ctx context.Context, c *client) error { return a.monitor(ctx, c, f, filter) })
	}
	return cmd
}

// monitor prints events until ctx ends.
func (a *app) monitor(ctx context.Context, c *client, f monitorFlags, filter monitor.Filter) error {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	if f.untilInputEnds {
		go func() {
			_, _ = io.Copy(io.Discard, a.In)
			cancel()
		}()
	}
	var s agent.Status
	if err := c.get(ctx, "/v1/status", &s); err != nil {
		return err
	}
	if s.NodeMonitor.State != agent.StateOk {
		return fmt.Errorf("the agent does not listen for events yet: %s", s.NotReady)
	}
	body, err := c.stream(ctx, "/v1/monitor")
	if err != nil {
		return err
	}
	defer body.Close()
	out := bufio.NewWriterSize(a.Out, 64<<10)
	p := monitor.NewPrinter(out)
	p.Hex, p.Numeric, p.Link = f.hex, f.numeric, linkName()
	switch {
	case f.json || a.output == "json":
		p.Verbosity = monitor.JSON
	case f.verbose >= 2:
		p.Verbosity = monitor.Dissected
	case f.verbose == 1:
		p.Verbosity = monitor.Verbose
	}
	if p.Verbosity != monitor.JSON {
		fmt.Fprintf(out, "%s\nPress Ctrl-C to quit\n", s.NodeMonitor.Message)
	}
	if err := out.Flush(); err != nil {
		return err
	}
	in := bufio.NewReaderSize(body, 64<<10)
	for frames := monitor.NewReader(in); ; {
		e, err := frames.Next()
		switch {
		case ctx.Err() != nil:
			return nil
		case errors.Is(err, io.EOF):
			return errors.Join(out.Flush(), errors.New("the agent has ended"))
		case err != nil:
			return errors.Join(out.Flush(), fmt.Errorf("events from the agent: %w", err))
		}
		if len(e.Data) == 0 {
			p.Lost(e.CPU, e.Lost)
		} else if m, err := monitor.Decode(e.Data); err != nil {
			fmt.Fprintln(a.Err, err)
		} else if filter.Match(m) {
			p.Print(e.CPU, m)
		}
		if in.Buffered() == 0 {
			if err := out.Flush(); err != nil {
				return err
			}
		}
	}
}

// linkName names devices of this network namespace, each asked for once.
func linkName() func(uint32) string {
	known := map[uint32]string{}
	return func(i uint32) string {
		if name, ok := known[i]; ok {
			return name
		}
		name := strconv.Itoa(int(i))
		if l, err := net.InterfaceByIndex(int(i)); err == nil {
			name = l.Name
			known[i] = name
		}
		return name
	}
}

func (a *app) configCommand() *cobra.Command {
	cmd := &cobra.Command{
		Use:     "config [OPTION=VALUE ...]",
		Short:   "Show or change what can be changed while the agent runs",
		GroupID: "node",
		Long: `config shows the options of a node that can be changed while its agent runs, and changes those that are given. Nothing is loaded anew, and
the next packet is treated accordingly. A change lasts until the agent starts again; the chart's values are what it starts with.`,
		Example: "  lash config MonitorAggregationLevel=None Debug=Enabled",
	}
	a.outputFlag(cmd)
	cmd.RunE = func(cmd *cobra.Command, args []string) error {
		want := map[string]string{}
		for _, arg := range args {
			name, value, ok := strings.Cut(arg, "=")
			if !ok || name == "" {
				return fmt.Errorf("%q: must be OPTION=VALUE, like MonitorAggregationLevel=None", arg)
			}
			want[name] = value
		}
		return a.onAgent(cmd, args, func(ctx context.Context, c *client) error {
			var options []agent.Option
			var err error
			if len(want) > 0 {
				err = c.patch(ctx, "/v1/config", want, &options)
			} else {
				err = c.get(ctx, "/v1/config", &options)
			}
			if err != nil {
				return err
			}
			if done, err := a.printJSON(options); done || err != nil {
				return err
			}
			for _, o := range options {
				fmt.Fprintf(a.Out, "%-33s : %-12s (%s)\n", o.Name, o.Value, o.Takes)
			}
			return nil
		})
	}
	return cmd
}
