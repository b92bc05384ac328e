// SPDX-License-Identifier: Apache-2.0

// Package node is one machine of a sandbox seen from inside and from its door: what it is configured
// with (Spec), its process 1 (Init), and how to start and enter it (Launch, Enter).
package node

import (
	"encoding/json"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
)

// Spec is everything a node needs to know to boot; it is stored as node.json in Dir.
type Spec struct {
	Name      string
	Dir       string // what survives a reboot: containerd's and kubelet's data, logs, certificates
	IP4, IP6  netip.Addr
	Gateway4  netip.Addr
	Gateway6  netip.Addr
	Zone      string
	Proxy     string // "none" or "iptables"
	Pods      []netip.Prefix
	DNS       netip.Addr
	APIServer string // https://ADDRESS:PORT
	APIHost   netip.Addr
	Sandbox   string // image that holds a pod's namespaces
	Kubelet   string // paths of programs
	KubeProxy string
	MaxPods   int
}

// Kept are the directories below Dir that appear at the same path inside the node.
var Kept = []string{"/var/lib/kubelet", "/var/lib/containerd", "/var/lib/cni", "/var/log", "/etc/cni/net.d", "/opt/cni/bin", "/etc/kubernetes"}

// Load reads a node's specification from its directory.
func Load(dir string) (Spec, error) {
	var s Spec
	b, err := os.ReadFile(filepath.Join(dir, "node.json"))
	if err != nil {
		return s, err
	}
	return s, json.Unmarshal(b, &s)
}

// Write makes the node's directory: the specification and the configuration of its daemons. It is
// repeatable and leaves the daemons' data alone.
func (s Spec) Write() error {
	for _, d := range Kept {
		if err := os.MkdirAll(filepath.Join(s.Dir, d), 0o755); err != nil {
			return err
		}
	}
	b, err := json.MarshalIndent(s, "", "  ")
	if err != nil {
		return err
	}
	for name, data := range map[string]string{
		"node.json":                      string(b) + "\n",
		"etc/kubernetes/containerd.toml": s.containerdConfig(),
		"etc/kubernetes/kubelet.yaml":    s.kubeletConfig(),
		"etc/kubernetes/kube-proxy.yaml": s.kubeProxyConfig(),
	} {
		f := filepath.Join(s.Dir, name)
		if err := os.WriteFile(f+".new", []byte(data), 0o644); err != nil {
			return err
		}
		if err := os.Rename(f+".new", f); err != nil {
			return err
		}
	}
	return nil
}

func (s Spec) containerdConfig() string {
	// restrict_oom_score_adj: machines without CAP_SYS_RESOURCE cannot lower a score
	return fmt.Sprintf(`version = 2
root = "/var/lib/containerd"
state = "/run/containerd"
disabled_plugins = ["io.containerd.snapshotter.v1.btrfs", "io.containerd.snapshotter.v1.zfs", "io.containerd.snapshotter.v1.aufs", "io.containerd.snapshotter.v1.devmapper", "io.containerd.tracing.processor.v1.otlp", "io.containerd.internal.v1.tracing"]
[grpc]
  address = "/run/containerd/containerd.sock"
[plugins."io.containerd.grpc.v1.cri"]
  restrict_oom_score_adj = true
  sandbox_image = %q
  [plugins."io.containerd.grpc.v1.cri".cni]
    bin_dir = "/opt/cni/bin"
    conf_dir = "/etc/cni/net.d"
  [plugins."io.containerd.grpc.v1.cri".containerd]
    snapshotter = "overlayfs"
    default_runtime_name = "runc"
    [plugins."io.containerd.grpc.v1.cri".containerd.runtimes.runc]
      runtime_type = "io.containerd.runc.v2"
      [plugins."io.containerd.grpc.v1.cri".containerd.runtimes.runc.options]
        SystemdCgroup = false
`, s.Sandbox)
}

func (s Spec) kubeletConfig() string {
	return fmt.Sprintf(`apiVersion: kubelet.config.k8s.io/v1beta1
kind: KubeletConfiguration
address: "::"
cgroupDriver: cgroupfs
failCgroupV1: false
failSwapOn: false
containerRuntimeEndpoint: unix:///run/containerd/containerd.sock
clusterDNS: [%q]
clusterDomain: cluster.local
resolvConf: /etc/resolv.conf
tlsCertFile: /etc/kubernetes/serving.crt
tlsPrivateKeyFile: /etc/kubernetes/serving.key
authentication: {anonymous: {enabled: false}, webhook: {enabled: true}, x509: {clientCAFile: /etc/kubernetes/ca.crt}}
authorization: {mode: Webhook}
evictionHard: {memory.available: 100Mi, nodefs.available: "0%%", nodefs.inodesFree: "0%%", imagefs.available: "0%%", imagefs.inodesFree: "0%%"}
imageGCHighThresholdPercent: 100
serializeImagePulls: false
nodeStatusUpdateFrequency: 5s
shutdownGracePeriod: 0s
maxPods: %d
kubeAPIQPS: 100
kubeAPIBurst: 200
`, s.DNS, s.MaxPods)
}

func (s Spec) kubeProxyConfig() string {
	pods := make([]string, len(s.Pods))
	for i, p := range s.Pods {
		pods[i] = p.String()
	}
	// nf_conntrack_max belongs to the machine: 0 leaves it alone
	return fmt.Sprintf(`apiVersion: kubeproxy.config.k8s.io/v1alpha1
kind: KubeProxyConfiguration
mode: %q
bindAddress: "::"
clusterCIDR: %q
clientConnection: {kubeconfig: /etc/kubernetes/kube-proxy.conf}
conntrack: {maxPerCore: 0, min: 0}
nodePortAddresses: [primary]
`, s.Proxy, strings.Join(pods, ","))
}

func (s Spec) containerd() []string {
	return []string{"containerd", "--config", "/etc/kubernetes/containerd.toml"}
}

func (s Spec) kubelet() []string {
	return []string{s.Kubelet, "--config=/etc/kubernetes/kubelet.yaml", "--kubeconfig=/etc/kubernetes/kubelet.conf",
		"--hostname-override=" + s.Name, "--node-ip=" + s.IP4.String() + "," + s.IP6.String(),
		"--node-labels=topology.kubernetes.io/region=sandbox,topology.kubernetes.io/zone=" + s.Zone, "--v=2"}
}

func (s Spec) kubeProxy() []string {
	return []string{s.KubeProxy, "--config=/etc/kubernetes/kube-proxy.yaml", "--hostname-override=" + s.Name, "--v=2"}
}
