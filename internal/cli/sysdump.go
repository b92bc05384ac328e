// SPDX-License-Identifier: Apache-2.0

package cli

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/spf13/cobra"
	corev1 "k8s.io/api/core/v1"
	"k8s.io/client-go/dynamic"

	"github.com/lash-net/lash/api/agent"
	"github.com/lash-net/lash/internal/sysdump"
)

const operatorSelector = "name=lash-operator"

func (a *app) sysdumpCommand() *cobra.Command {
	var filename string
	var since time.Duration
	var thisNode, stream bool
	o := sysdump.Options{AgentLabel: agentSelector, OtherLabel: operatorSelector}
	cmd := &cobra.Command{
		Use:     "sysdump",
		Short:   "Collect in one archive what is needed to find out what is wrong",
		GroupID: "cluster",
		Args:    cobra.NoArgs,
		Long: `Collect in one archive what is needed to find out what is wrong: of each node the agent's status, tables and maps, and
the kernel's devices, routes, filters and sysctls; the Kubernetes objects Lash acts on; events; logs of agents and operator.

What cannot be collected, as from a node whose agent is dead, is named at the end and in the archive's errors.txt, and does not stop
the rest. Kubernetes Secrets are not read, and what looks like a secret elsewhere, by its name or by itself, is redacted. Addresses,
names and labels are not: read an archive before you give it to others.`,
		Example: `  lash sysdump
  lash sysdump --node-list worker-1,worker-2 --logs-since-time 1h
  lash sysdump --output-filename incident-7`,
	}
	f := cmd.Flags()
	f.StringVar(&filename, "output-filename", "lash-sysdump-<ts>", "name of the archive, without .tar.gz; <ts> is the time")
	f.StringSliceVar(&o.Nodes, "node-list", nil, "names of the nodes whose agents are asked (default: all)")
	f.DurationVar(&since, "logs-since-time", 0, "how far back logs go (default: to their beginning)")
	f.Int64Var(&o.LogsLimit, "logs-limit-bytes", 64<<20, "how long a log may be")
	f.IntVar(&o.Workers, "worker-count", 4, "how much is collected at once")
	f.DurationVar(&o.Timeout, "timeout", 2*time.Minute, "how long a node, a kind of objects or a log may take")
	f.BoolVar(&o.Quick, "quick", false, "without connections and logs of before a restart")
	f.BoolVar(&thisNode, "this-node", false, "only the node the command runs on, without asking the API server")
	f.BoolVar(&stream, "stream", false, "write what this node has to the standard output, for the command on another machine")
	_ = f.MarkHidden("stream")
	cmd.RunE = func(cmd *cobra.Command, _ []string) error {
		ctx, now := cmd.Context(), time.Now()
		if stream {
			s := sysdump.NewStream(a.Out, now)
			a.dumpNode(ctx, s, o.Quick)
			return s.Close()
		}
		if since > 0 {
			o.LogsSince = now.Add(-since)
		}
		o.Progress = func(done, all int, what string) {
			fmt.Fprintf(a.Err, "%5.1fs  %d/%d  %s\n", time.Since(now).Seconds(), done, all, what)
		}
		name := strings.ReplaceAll(strings.TrimSuffix(filename, ".tar.gz"), "<ts>", now.UTC().Format("20060102-150405"))
		collect := func(archive *sysdump.Archive) error {
			a.dumpNode(ctx, archive, o.Quick)
			return nil
		}
		if !thisNode {
			c, err := a.dumpedCluster(o.Quick)
			if err != nil {
				return err
			}
			collect = func(archive *sysdump.Archive) error { return c.Collect(ctx, archive, o) }
		}
		return a.writeDump(ctx, name+".tar.gz", now, collect)
	}
	return cmd
}

// writeDump writes the archive, which appears under its name when it is whole, and says what is in it.
func (a *app) writeDump(ctx context.Context, path string, now time.Time, collect func(*sysdump.Archive) error) (err error) {
	file, err := os.CreateTemp(filepath.Dir(path), ".lash-sysdump-*")
	if err != nil {
		return fmt.Errorf("--output-filename: %w", err)
	}
	defer func() { err = errors.Join(err, file.Close(), removeIfThere(file.Name())) }()
	archive := sysdump.NewArchive(file, strings.TrimSuffix(filepath.Base(path), ".tar.gz"), now)
	if err := collect(archive); err != nil {
		return err
	}
	if err := archive.Close(); err != nil {
		return fmt.Errorf("write the archive: %w", err)
	}
	if err := ctx.Err(); err != nil {
		return fmt.Errorf("interrupted; no archive is written: %w", err)
	}
	if err := os.Rename(file.Name(), path); err != nil {
		return err
	}
	problems := archive.Problems()
	for _, p := range problems {
		fmt.Fprintf(a.Err, "not collected: %s: %v\n", p.Part, p.Err)
	}
	fmt.Fprintf(a.Out, "%s: %d files", path, archive.Files())
	if len(problems) > 0 {
		fmt.Fprintf(a.Out, ", %d parts could not be collected (see errors.txt in it)", len(problems))
	}
	fmt.Fprintln(a.Out)
	return nil
}

func removeIfThere(path string) error {
	if err := os.Remove(path); !errors.Is(err, os.ErrNotExist) {
		return err
	}
	return nil
}

// dumpNode collects what there is on this node.
func (a *app) dumpNode(ctx context.Context, archive *sysdump.Archive, quick bool) {
	c := newClient(a.socket)
	archive.Agent(ctx, c.get, quick, sysdump.Part{Name: "status.txt", Get: func(ctx context.Context) ([]byte, error) {
		var s agent.Status
		if err := c.get(ctx, "/v1/status?nodes", &s); err != nil {
			return nil, err
		}
		var b bytes.Buffer
		printStatus(&b, &s, true)
		return b.Bytes(), nil
	}})
	archive.Kernel(ctx)
}

func (a *app) dumpedCluster(quick bool) (sysdump.Cluster, error) {
	k, err := a.cluster()
	if err != nil {
		return sysdump.Cluster{}, err
	}
	objects, err := dynamic.NewForConfig(k.rest)
	if err != nil {
		return sysdump.Cluster{}, err
	}
	return sysdump.Cluster{Namespace: a.namespace, Objects: objects, Client: k.clientset, Node: func(ctx context.Context, pod *corev1.Pod, out io.Writer) error {
		if pod.Status.Phase != corev1.PodRunning {
			return fmt.Errorf("the agent's pod %s is %s: %s", pod.Name, pod.Status.Phase, podProblem(pod))
		}
		var said bytes.Buffer
		command := []string{"/usr/bin/lash", "sysdump", "--stream", fmt.Sprintf("--quick=%t", quick)}
		err := k.exec(ctx, pod, command, Streams{Out: out, Err: &said})
		if errors.Is(err, errSilent) {
			err = fmt.Errorf("run %q in pod %s: %s", strings.Join(command, " "), pod.Name, strings.TrimSpace(said.String()))
		}
		return err
	}}, nil
}
