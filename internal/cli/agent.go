// SPDX-License-Identifier: Apache-2.0

package cli

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"slices"
	"strings"
	"syscall"
	"time"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/util/httpstream"
	"k8s.io/cli-runtime/pkg/genericclioptions"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/kubernetes/scheme"
	"k8s.io/client-go/rest"
	"k8s.io/client-go/tools/remotecommand"
	utilexec "k8s.io/client-go/util/exec"

	"github.com/lash-net/lash/api/agent"
)

const (
	agentSelector  = "k8s-app=lash"
	agentContainer = "lash-agent"
)

// client asks the agent behind a socket.
type client struct {
	socket string
	http   *http.Client
}

func newClient(socket string) *client {
	return &client{socket, &http.Client{
		Timeout: 30 * time.Second,
		Transport: &http.Transport{DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
			return (&net.Dialer{}).DialContext(ctx, "unix", socket)
		}},
	}}
}

// get decodes the answer to GET path into out. An answer that is no 200 is returned as the agent's error.
func (c *client) get(ctx context.Context, path string, out any) error {
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, "http://lash"+path, nil)
	if err != nil {
		return err
	}
	return c.do(req, out)
}

// patch sends in and decodes the answer into out.
func (c *client) patch(ctx context.Context, path string, in, out any) error {
	return c.send(ctx, http.MethodPatch, path, in, out)
}

// post does so, too.
func (c *client) post(ctx context.Context, path string, in, out any) error {
	return c.send(ctx, http.MethodPost, path, in, out)
}

func (c *client) send(ctx context.Context, method, path string, in, out any) error {
	b, err := json.Marshal(in)
	if err != nil {
		return err
	}
	req, err := http.NewRequestWithContext(ctx, method, "http://lash"+path, bytes.NewReader(b))
	if err != nil {
		return err
	}
	return c.do(req, out)
}

// stream returns the body of GET path, which goes on until ctx ends or the agent does.
func (c *client) stream(ctx context.Context, path string) (io.ReadCloser, error) {
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, "http://lash"+path, nil)
	if err != nil {
		return nil, err
	}
	unlimited := *c.http
	unlimited.Timeout = 0
	resp, err := unlimited.Do(req)
	if err != nil {
		return nil, c.explain(err)
	}
	if resp.StatusCode != http.StatusOK {
		defer resp.Body.Close()
		return nil, answerError(resp, path)
	}
	return resp.Body, nil
}

// explain says what to do about an agent that does not answer.
func (c *client) explain(err error) error {
	switch {
	case errors.Is(err, syscall.EACCES):
		return fmt.Errorf("%s may only be used by root: try sudo", c.socket)
	case errors.Is(err, syscall.ECONNREFUSED):
		return fmt.Errorf("the agent is not running (nothing listens on %s): see the log of its pod", c.socket)
	}
	return fmt.Errorf("ask the agent: %w", err)
}

// answerError is the agent's error.
func answerError(resp *http.Response, path string) error {
	body, _ := io.ReadAll(resp.Body)
	var e agent.Error
	if json.Unmarshal(body, &e) == nil && e.Error != "" {
		return errors.New(e.Error)
	}
	return fmt.Errorf("the agent answers %s to %s: is it of another version?", resp.Status, path)
}

func (c *client) do(req *http.Request, out any) error {
	path := req.URL.Path
	resp, err := c.http.Do(req)
	if err != nil {
		return c.explain(err)
	}
	defer resp.Body.Close()
	if resp.StatusCode != http.StatusOK {
		return answerError(resp, path)
	}
	body, err := io.ReadAll(resp.Body)
	if err != nil {
		return fmt.Errorf("ask the agent: %w", err)
	}
	if err := json.Unmarshal(body, out); err != nil {
		return fmt.Errorf("answer of the agent to %s: %w", path, err)
	}
	return nil
}

// onAgent runs f with the agent of this machine, or, where there is none or another node is meant, the whole command in
// the pod of an agent.
func (a *app) onAgent(cmd *cobra.Command, args []string, f func(context.Context, *client) error) error {
	ctx := cmd.Context()
	_, err := os.Stat(a.socket)
	if a.kubeconfig == "" && a.context == "" && a.node == "" && err == nil {
		return f(ctx, newClient(a.socket))
	}
	if err != nil && cmd.Flags().Changed("socket") {
		return fmt.Errorf("no socket %s: is the agent running on this machine?", a.socket)
	}
	k, err := a.cluster()
	if err != nil {
		return fmt.Errorf("no agent runs on this machine (%s), and no cluster can be asked: %w", a.socket, err)
	}
	pod, err := k.agentPod(ctx, a.namespace, a.node)
	if err != nil {
		return err
	}
	if a.node == "" {
		fmt.Fprintf(a.Err, "node %s (--node chooses another)\n", pod.Spec.NodeName)
	}
	remote, streams := remoteArgs(cmd, args), Streams{Out: a.Out, Err: a.Err}
	if cmd.Flags().Lookup("until-input-ends") != nil {
		// A command that goes on until it is interrupted ends there, too, when its input does.
		in, end := io.Pipe()
		defer end.Close()
		remote, streams.In = append(remote, "--until-input-ends"), in
	}
	return k.exec(ctx, pod, append([]string{"/usr/bin/lash"}, remote...), streams)
}

// remoteArgs returns the command line of cmd without the flags that say where to run it.
func remoteArgs(cmd *cobra.Command, args []string) []string {
	out := strings.Fields(cmd.CommandPath())[1:]
	cmd.Flags().Visit(func(f *pflag.Flag) {
		if cmd.InheritedFlags().Lookup(f.Name) == nil && f.Name != "wait" && f.Name != "wait-duration" {
			if list, ok := f.Value.(pflag.SliceValue); ok {
				for _, v := range list.GetSlice() {
					out = append(out, "--"+f.Name+"="+v)
				}
				return
			}
			out = append(out, "--"+f.Name+"="+f.Value.String())
		}
	})
	return append(out, args...)
}

// cluster is a cluster reached through a kubeconfig.
type cluster struct {
	flags     *genericclioptions.ConfigFlags
	rest      *rest.Config
	clientset kubernetes.Interface
}

func (a *app) cluster() (*cluster, error) {
	flags := genericclioptions.NewConfigFlags(true)
	if a.kubeconfig != "" {
		if _, err := os.Stat(a.kubeconfig); err != nil {
			return nil, fmt.Errorf("--kubeconfig: %w", err)
		}
		flags.KubeConfig = &a.kubeconfig
	}
	if a.context != "" {
		flags.Context = &a.context
	}
	flags.Namespace = &a.namespace
	config, err := flags.ToRESTConfig()
	if err != nil {
		return nil, fmt.Errorf("%w: give one with --kubeconfig or $KUBECONFIG", err)
	}
	config.QPS, config.Burst = 50, 100
	clientset, err := kubernetes.NewForConfig(config)
	if err != nil {
		return nil, err
	}
	return &cluster{flags, config, clientset}, nil
}

// agentPod returns a running agent's pod, that of node if node is not empty.
func (k *cluster) agentPod(ctx context.Context, namespace, node string) (*corev1.Pod, error) {
	opts := metav1.ListOptions{LabelSelector: agentSelector}
	if node != "" {
		opts.FieldSelector = "spec.nodeName=" + node
	}
	pods, err := k.clientset.CoreV1().Pods(namespace).List(ctx, opts)
	if err != nil {
		return nil, fmt.Errorf("find the agents: %w", err)
	}
	slices.SortFunc(pods.Items, func(x, y corev1.Pod) int {
		if rx, ry := ready(&x), ready(&y); rx != ry {
			if rx {
				return -1
			}
			return 1
		}
		return strings.Compare(x.Spec.NodeName, y.Spec.NodeName)
	})
	for i := range pods.Items {
		if p := &pods.Items[i]; p.Status.Phase == corev1.PodRunning && p.DeletionTimestamp == nil {
			return p, nil
		}
	}
	switch {
	case len(pods.Items) > 0:
		return nil, fmt.Errorf("the agent's pod %s is %s, not running: see 'kubectl -n %s describe pod %[1]s'", pods.Items[0].Name, pods.Items[0].Status.Phase, namespace)
	case node != "":
		return nil, fmt.Errorf("no agent on node %q: 'kubectl get nodes' shows the names of nodes", node)
	}
	return nil, fmt.Errorf("no agent in namespace %s: 'lash install' installs Lash, --namespace looks elsewhere", namespace)
}

func ready(p *corev1.Pod) bool {
	return slices.ContainsFunc(p.Status.Conditions, func(c corev1.PodCondition) bool {
		return c.Type == corev1.PodReady && c.Status == corev1.ConditionTrue
	})
}

// exec runs a command in an agent's container, with input if s has one.
func (k *cluster) exec(ctx context.Context, pod *corev1.Pod, command []string, s Streams) error {
	req := k.clientset.CoreV1().RESTClient().Post().Resource("pods").Namespace(pod.Namespace).Name(pod.Name).SubResource("exec").
		VersionedParams(&corev1.PodExecOptions{Container: agentContainer, Command: command, Stdin: s.In != nil, Stdout: true, Stderr: true}, scheme.ParameterCodec)
	spdy, err := remotecommand.NewSPDYExecutor(k.rest, "POST", req.URL())
	if err != nil {
		return err
	}
	ws, err := remotecommand.NewWebSocketExecutor(k.rest, "GET", req.URL().String())
	if err != nil {
		return err
	}
	executor, err := remotecommand.NewFallbackExecutor(ws, spdy, func(err error) bool {
		return httpstream.IsUpgradeFailure(err) || httpstream.IsHTTPSProxyError(err)
	})
	if err != nil {
		return err
	}
	err = executor.StreamWithContext(ctx, remotecommand.StreamOptions{Stdin: s.In, Stdout: s.Out, Stderr: s.Err})
	var exit utilexec.CodeExitError
	if errors.As(err, &exit) {
		return errSilent // the command has said why, on its own error output
	}
	if err != nil {
		return fmt.Errorf("run %q in pod %s: %w", strings.Join(command, " "), pod.Name, err)
	}
	return nil
}
