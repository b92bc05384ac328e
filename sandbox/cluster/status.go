// SPDX-License-Identifier: Apache-2.0

package cluster

import (
	"context"
	"encoding/json"
	"fmt"
	"os"
	"strconv"
	"strings"
	"time"

	"github.com/lash-net/lash/sandbox/plan"
)

// Status is what `sandbox status` shows.
type Status struct {
	Config
	Kubeconfig string          `json:"kubeconfig"`
	Ready      bool            `json:"apiServerReady"`
	Components []ProcessStatus `json:"components"`
	Machines   []NodeStatus    `json:"machines"`
}

// ProcessStatus is one process of the control plane.
type ProcessStatus struct {
	Name    string `json:"name"`
	Running bool   `json:"running"`
	Pid     int    `json:"pid,omitempty"`
	MiB     int    `json:"mib,omitempty"`
	Log     string `json:"log"`
}

// NodeStatus is one node: the machine, and what Kubernetes says of it.
type NodeStatus struct {
	Name      string   `json:"name"`
	Running   bool     `json:"running"`
	Pid       int      `json:"pid,omitempty"`
	Addresses []string `json:"addresses"`
	Ready     string   `json:"ready"` // True, False, Unknown, or empty when Kubernetes does not know the node
	PodCIDRs  []string `json:"podCIDRs,omitempty"`
	Logs      string   `json:"logs"`
}

// Status looks at processes first, so that it answers also when the API server does not.
func (c *Cluster) Status(ctx context.Context) Status {
	s := Status{Config: c.Config, Kubeconfig: c.Kubeconfig(false)}
	for _, p := range Components {
		ref := c.process(p)
		ps := ProcessStatus{Name: p, Running: ref.Alive(), Log: c.logfile(p)}
		if ps.Running {
			ps.Pid, ps.MiB = ref.Pid, rssMiB(ref.Pid)
		}
		s.Components = append(s.Components, ps)
	}
	var list struct {
		Items []struct {
			Metadata struct{ Name string }
			Spec     struct{ PodCIDRs []string }
			Status   struct {
				Conditions []struct{ Type, Status string }
			}
		}
	}
	ctx, cancel := context.WithTimeout(ctx, 5*time.Second)
	defer cancel()
	if c.process("apiserver").Alive() {
		if out, err := c.Kubectl(ctx, "get", "nodes", "-o", "json"); err == nil {
			s.Ready = json.Unmarshal([]byte(out), &list) == nil
		}
	}
	for _, n := range c.Nodes {
		ns := NodeStatus{Name: n, Logs: c.nodeDir(n) + "/var/log"}
		if i, err := plan.NodeIndex(n); err == nil {
			v4, v6 := plan.NodeAddrs(i)
			ns.Addresses = []string{v4.String(), v6.String()}
		}
		if ref := c.init(n); ref.Alive() {
			ns.Running, ns.Pid = true, ref.Pid
		}
		for _, it := range list.Items {
			if it.Metadata.Name != n {
				continue
			}
			ns.PodCIDRs = it.Spec.PodCIDRs
			for _, cond := range it.Status.Conditions {
				if cond.Type == "Ready" {
					ns.Ready = cond.Status
				}
			}
		}
		s.Machines = append(s.Machines, ns)
	}
	return s
}

func rssMiB(pid int) int {
	b, err := os.ReadFile("/proc/" + strconv.Itoa(pid) + "/status")
	if err != nil {
		return 0
	}
	for line := range strings.Lines(string(b)) {
		if f := strings.Fields(line); len(f) > 1 && f[0] == "VmRSS:" {
			kb, _ := strconv.Atoi(f[1])
			return kb >> 10
		}
	}
	return 0
}

// Logs lists the log files of a component or node.
func (c *Cluster) Logs(who string) ([]string, error) {
	if CheckComponent(who) == nil {
		return []string{c.logfile(who)}, nil
	}
	if err := c.HasNode(who); err != nil {
		return nil, fmt.Errorf("%w (and the parts of the control plane: %s)", err, strings.Join(Components, ", "))
	}
	d := c.nodeDir(who) + "/var/log/"
	return []string{c.logfile(who), d + "containerd.log", d + "kubelet.log", d + "kube-proxy.log"}, nil
}
