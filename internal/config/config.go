// SPDX-License-Identifier: Apache-2.0

package config

import (
	"net/netip"
	"time"
)

// Config holds every setting. The tags are its documentation: key is the name in the ConfigMap and of the flag,
// default the value when nobody sets it, doc the sentence in the reference, one-of the values allowed.
//
// The names are those the field's users already know; see docs/reference/configuration.md.
type Config struct {
	// Address families and routing.
	EnableIPv4                bool           `key:"enable-ipv4" default:"true" section:"Routing" doc:"Give pods IPv4 addresses and forward IPv4."`
	EnableIPv6                bool           `key:"enable-ipv6" default:"false" section:"Routing" doc:"Give pods IPv6 addresses and forward IPv6. The nodes need IPv6 addresses; 'lash install' turns it on when they have them."`
	RoutingMode               string         `key:"routing-mode" default:"tunnel" one-of:"native,tunnel,hybrid" section:"Routing" doc:"How packets reach pods on other nodes. tunnel: encapsulated; the network needs to know the nodes only. native: the network or routes on the nodes carry pod addresses. hybrid: native to nodes on the same link, tunnel to the others. While nodes differ, each encapsulates to those only that announce the tunnel."`
	TunnelProtocol            string         `key:"tunnel-protocol" default:"vxlan" one-of:"vxlan,geneve" section:"Routing" doc:"Encapsulation between nodes."`
	TunnelPort                int            `key:"tunnel-port" default:"0" section:"Routing" doc:"UDP port of the tunnel. 0: 8472 for vxlan, 6081 for geneve."`
	UnderlayProtocol          string         `key:"underlay-protocol" default:"auto" one-of:"auto,ipv4,ipv6" section:"Routing" doc:"Family of the nodes' addresses between which the tunnel runs; either carries both families of pods. auto: IPv4 if enable-ipv4, else IPv6."`
	AutoDirectNodeRoutes      bool           `key:"auto-direct-node-routes" default:"true" section:"Routing" doc:"Install one route a node to the pod CIDRs of every node on the same link that packets are not encapsulated to."`
	DirectRoutingSkipUnreach  bool           `key:"direct-routing-skip-unreachable" default:"false" section:"Routing" doc:"Say nothing about nodes that are not on the same link; otherwise each is an error in 'lash status'."`
	IPv4NativeRoutingCIDR     netip.Prefix   `key:"ipv4-native-routing-cidr" default:"" section:"Routing" doc:"IPv4 destinations the network routes without translation; packets to them are never masqueraded, and neither are those to pods of other nodes that are encapsulated. Empty: the IPv4 pod CIDRs of the cluster."`
	IPv6NativeRoutingCIDR     netip.Prefix   `key:"ipv6-native-routing-cidr" default:"" section:"Routing" doc:"The same for IPv6."`
	EnableHostLegacyRouting   bool           `key:"enable-host-legacy-routing" default:"false" section:"Routing" doc:"Send packets through the host's IP stack and netfilter even where BPF host routing is possible."`
	MTU                       int            `key:"mtu" default:"0" section:"Routing" doc:"MTU of pod interfaces in bytes; routes over the tunnel have that much less that the encapsulation takes: 50 over IPv4, 70 over IPv6. 0: the smallest MTU of the detected devices."`
	Devices                   []string       `key:"devices" default:"" section:"Routing" doc:"Network devices that carry traffic of the cluster and to the outside, separated by commas; a trailing + matches a prefix. Empty: detected from the routing table."`
	DirectRoutingDevice       string         `key:"direct-routing-device" default:"" section:"Routing" doc:"The device on which nodes reach each other. Empty: the one that has the node's InternalIP."`
	EnableIPv4Masquerade      bool           `key:"enable-ipv4-masquerade" default:"true" section:"Masquerading" doc:"Give IPv4 packets that leave the cluster the address of the node."`
	EnableIPv6Masquerade      bool           `key:"enable-ipv6-masquerade" default:"true" section:"Masquerading" doc:"Give IPv6 packets that leave the cluster the address of the node."`
	EnableBPFMasquerade       bool           `key:"enable-bpf-masquerade" default:"true" section:"Masquerading" doc:"Masquerade in BPF; BPF host routing requires it. false: by the kernel's netfilter (IPTables in the status)."`
	EnableIPMasqAgent         bool           `key:"enable-ip-masq-agent" default:"false" section:"Masquerading" doc:"Do not masquerade to the destinations that the file of ip-masq-agent lists either. It is read again while the agent runs."`
	IPMasqAgentConfigPath     string         `key:"ip-masq-agent-config-path" default:"/etc/config/ip-masq-agent" section:"Masquerading" doc:"That file, YAML or JSON: nonMasqueradeCIDRs, masqLinkLocal, masqLinkLocalIPv6, cidrLimit, resyncInterval. If it is not there or empty: private and reserved IPv4 ranges, and link-local ones."`
	KubeProxyReplacement      bool           `key:"kube-proxy-replacement" default:"true" section:"Services" doc:"Implement Kubernetes services instead of kube-proxy. BPF host routing requires it."`
	NodePortRange             PortRange      `key:"node-port-range" default:"30000-32767" section:"Services" doc:"Ports the API server hands out to NodePort services; masquerading keeps out of them."`
	BPFLBMapMax               int            `key:"bpf-lb-map-max" default:"65536" section:"Services" doc:"Rows of the map of frontends, from 256 to 16777216; four times as many backends."`
	LBMode                    string         `key:"bpf-lb-mode" default:"snat" one-of:"snat,dsr,hybrid" section:"Services" doc:"How packets from outside reach backends on other nodes. snat: from this node's address, and back through it. dsr: the backend's node answers the client. hybrid: dsr for TCP, snat for the rest. Annotation service.cilium.io/forwarding-mode (or service.lash.io) chooses for a service."`
	LBDSRDispatch             string         `key:"bpf-lb-dsr-dispatch" default:"opt" one-of:"opt,ipip,geneve" section:"Services" doc:"How dsr tells the backend's node which address the client asked. opt: by an IP option. geneve: by an option of Geneve around the packet, for networks that drop IP options; needs tunnel-protocol geneve, in any routing mode. Inside a tunnel it is always an IP option, which no network sees there. ipip: refused."`
	LBAlgorithm               string         `key:"bpf-lb-algorithm" default:"random" one-of:"random,maglev" section:"Services" doc:"How a backend is chosen for connections from outside. maglev: by a hash of the client, the same on every node. Annotation service.cilium.io/lb-algorithm (or service.lash.io) chooses for a service."`
	LBMaglevTableSize         int            `key:"bpf-lb-maglev-table-size" default:"16381" section:"Services" doc:"Entries of a service's Maglev table: 251, 509, 1021, 2039, 4093, 8191, 16381, 32749, 65521 or 131071. A hundred times the backends a service has is enough; a table takes 8 bytes an entry."`
	LBMaglevHashSeed          string         `key:"bpf-lb-maglev-hash-seed" default:"JLfvgnHc2kaSUFaI" section:"Services" doc:"Seed of Maglev tables, 12 bytes in base64, the same on all nodes."`
	LBAcceleration            string         `key:"bpf-lb-acceleration" default:"disabled" one-of:"disabled,native,best-effort" section:"Services" doc:"Forward packets of connections from outside to backends on other nodes, and their answers, by XDP in the devices' drivers, before the kernel makes socket buffers of them; natively routed backends only. native: on every device, or the agent does not start. best-effort: on those whose drivers can; 'lash status --verbose' says why others cannot. Also the place of 'lash prefilter'."`
	LBXDPSpread               bool           `key:"bpf-lb-xdp-spread" default:"false" section:"Services" doc:"Spread the packets that XDP passes to the kernel over all CPUs by a hash of their connection (cpumap), for devices with fewer receive queues than there are CPUs. Needs bpf-lb-acceleration."`
	LBSockHostNSOnly          bool           `key:"bpf-lb-sock-hostns-only" default:"false" section:"Services" doc:"Translate services at the sockets of the node's own network namespace only. Pods are served packet by packet, as sidecars that redirect by address, and network stacks of their own in pods, need it."`
	LBSourceRangeAllTypes     bool           `key:"bpf-lb-source-range-all-types" default:"false" section:"Services" doc:"Apply loadBalancerSourceRanges to all addresses of a service that are served to clients outside, its NodePorts and external addresses too. false: to its load balancer's."`
	K8sServiceProxyName       string         `key:"k8s-service-proxy-name" default:"" section:"Services" doc:"Serve services whose label service.kubernetes.io/service-proxy-name has this value, and no others. Empty: those without the label."`
	LBExternalClusterIP       bool           `key:"bpf-lb-external-clusterip" default:"false" section:"Services" doc:"Serve cluster IPs to packets from outside, too."`
	ServiceTopology           bool           `key:"enable-service-topology" default:"true" section:"Services" doc:"Follow the topology hints of endpoints (trafficDistribution)."`
	SessionAffinity           bool           `key:"enable-session-affinity" default:"true" section:"Services" doc:"Follow sessionAffinity of services."`
	ServiceNoBackend          string         `key:"service-no-backend-response" default:"reject" one-of:"reject,drop" section:"Services" doc:"What clients of a service without backends get. reject: a refusal at once; drop: nothing."`
	NodePortAddresses         []netip.Prefix `key:"nodeport-addresses" default:"" section:"Services" doc:"CIDRs of the node's addresses on which NodePorts and HostPorts are served, separated by commas. Empty: all addresses of the devices."`
	NodePortBindProtection    bool           `key:"node-port-bind-protection" default:"true" section:"Services" doc:"Refuse processes of the node to bind ports that are services'."`
	KPRHealthzBindAddr        string         `key:"kube-proxy-replacement-healthz-bind-address" default:"" section:"Services" doc:"ADDRESS:PORT of a /healthz and /livez as kube-proxy has them, like 0.0.0.0:10256. Empty: none."`
	IPAM                      string         `key:"ipam" default:"cluster-pool" one-of:"cluster-pool,kubernetes" section:"IPAM" doc:"Who cuts the pod CIDR of a node. cluster-pool: the operator, out of the pools below. kubernetes: the controller manager (Node.spec.podCIDRs)."`
	ClusterPoolIPv4CIDR       []netip.Prefix `key:"cluster-pool-ipv4-cidr" default:"10.0.0.0/8" section:"IPAM" doc:"IPv4 pools for cluster-pool, separated by commas or spaces. They must not contain addresses of nodes or services."`
	ClusterPoolIPv4MaskSize   int            `key:"cluster-pool-ipv4-mask-size" default:"24" section:"IPAM" doc:"Prefix length of the IPv4 pod CIDR of a node."`
	ClusterPoolIPv6CIDR       []netip.Prefix `key:"cluster-pool-ipv6-cidr" default:"fd00::/104" section:"IPAM" doc:"IPv6 pools for cluster-pool, separated by commas or spaces."`
	ClusterPoolIPv6MaskSize   int            `key:"cluster-pool-ipv6-mask-size" default:"120" section:"IPAM" doc:"Prefix length of the IPv6 pod CIDR of a node."`
	NodesGCInterval           time.Duration  `key:"nodes-gc-interval" default:"30s" section:"IPAM" doc:"How long a CiliumNode may outlive its Node before the operator deletes it and frees its pod CIDRs. 0s: never."`
	ClusterName               string         `key:"cluster-name" default:"default" section:"Cluster" doc:"Name of the cluster, the label io.cilium.k8s.policy.cluster of every pod."`
	ClusterID                 int            `key:"cluster-id" default:"0" section:"Cluster" doc:"Number of the cluster among connected ones, 0 to 255; 0 if it stands alone."`
	Labels                    string         `key:"labels" default:"" section:"Cluster" doc:"Patterns of the labels that make an identity, added to the default ones and separated by spaces: an optional source (k8s:, any:), ! to exclude, and a regular expression for the beginning of the key. With one that includes, only what matches is kept. Example: k8s:app k8s:!job-name."`
	IdentityHeartbeatTimeout  time.Duration  `key:"identity-heartbeat-timeout" default:"30m0s" section:"Cluster" doc:"How long a CiliumIdentity must be without a CiliumEndpoint before the operator marks it. 0s: never."`
	IdentityGCInterval        time.Duration  `key:"identity-gc-interval" default:"15m0s" section:"Cluster" doc:"How long a marked CiliumIdentity stays before the operator deletes it; an agent that needs it takes the mark away."`
	CiliumEndpointGCInterval  time.Duration  `key:"cilium-endpoint-gc-interval" default:"5m0s" section:"Cluster" doc:"How often the operator looks for CiliumEndpoints whose pod is gone and deletes them. 0s: never."`
	K8sKubeConfigPath         string         `key:"k8s-kubeconfig-path" default:"" section:"Cluster" doc:"Kubeconfig for the API server. Empty: the service account of the pod, with KUBERNETES_SERVICE_HOST and _PORT."`
	AgentNotReadyTaintKey     string         `key:"agent-not-ready-taint-key" default:"node.cilium.io/agent-not-ready" section:"Cluster" doc:"Taint that keeps pods off a node until the agent is ready; the agent removes it."`
	UnmanagedPodWatcherPeriod time.Duration  `key:"unmanaged-pod-watcher-interval" default:"15s" section:"Cluster" doc:"How often to look for pods of the node that Lash does not manage. 0s: never."`
	CNIExclusive              bool           `key:"cni-exclusive" default:"false" section:"CNI" doc:"Rename the configurations of other CNI plugins to *.lash_bak, so that only Lash is used."`
	CNIConfDir                string         `key:"cni-conf-dir" default:"/etc/cni/net.d" section:"CNI" doc:"Directory for 05-lash.conflist."`
	CNIBinDir                 string         `key:"cni-bin-dir" default:"/opt/cni/bin" section:"CNI" doc:"Directory for the plugin lash-cni."`
	DatapathMode              string         `key:"datapath-mode" default:"veth" one-of:"veth" section:"Datapath" doc:"Kind of the device that connects a pod to its node."`
	EnableTCX                 bool           `key:"enable-tcx" default:"true" section:"Datapath" doc:"Attach programs by tcx links where the kernel has them (6.6); otherwise, and when false, by clsact filters."`
	BPFCTMax                  int            `key:"bpf-ct-max" default:"524288" section:"Datapath" doc:"Connections the node can track, from 1024 to 16777216."`
	MonitorAggregation        string         `key:"monitor-aggregation" default:"medium" one-of:"none,low,medium,maximum" section:"Datapath" doc:"Which packets of a connection cause events. none: all, where they come from and where they go; low: all, where they go; medium: of each direction the first, those with new TCP flags, and one each interval; maximum: the same without interval. 'lash config' changes it while the agent runs."`
	MonitorInterval           time.Duration  `key:"monitor-aggregation-interval" default:"5s" section:"Datapath" doc:"Time between two events of one direction of a connection at monitor-aggregation medium."`
	MonitorFlags              []string       `key:"monitor-aggregation-flags" default:"syn,fin,rst" section:"Datapath" doc:"TCP flags that cause an event when a direction has them for the first time: fin, syn, rst, psh, ack, urg, ece, cwr, or all."`
	BPFEventsDrop             bool           `key:"bpf-events-drop-enabled" default:"true" section:"Datapath" doc:"Tell listeners about drops. They are counted in either case."`
	BPFEventsVerdict          bool           `key:"bpf-events-policy-verdict-enabled" default:"true" section:"Datapath" doc:"Tell listeners what policy decided about new connections."`
	BPFEventsTrace            bool           `key:"bpf-events-trace-enabled" default:"true" section:"Datapath" doc:"Tell listeners about packets that are forwarded."`
	BPFRoot                   string         `key:"bpf-root" default:"/sys/fs/bpf" section:"Datapath" doc:"Mount point of the BPF file system; maps and links are pinned in its directory lash."`
	CgroupRoot                string         `key:"cgroup-root" default:"" section:"Datapath" doc:"Control group (version 2) for the socket programs. Empty: the root of the mounted hierarchy as the agent sees it."`
	EnableHealthChecking      bool           `key:"enable-health-checking" default:"true" section:"Health" doc:"Answer other nodes' probes, and probe every node: address and health endpoint, ICMP and HTTP."`
	EnableHealthEndpoint      bool           `key:"enable-endpoint-health-checking" default:"true" section:"Health" doc:"Give each node a health endpoint, lxc_health, with an address of the node's pod CIDRs."`
	ClusterHealthPort         int            `key:"cluster-health-port" default:"4240" section:"Health" doc:"TCP port on which nodes and health endpoints answer probes, and agents each other's questions for lash explain; the same on all nodes."`
	Debug                     bool           `key:"debug" default:"false" section:"Agent" doc:"Log details."`
	DebugVerbose              []string       `key:"debug-verbose" default:"" section:"Agent" doc:"Parts that log still more, separated by commas or spaces. datapath: debug events of the BPF programs."`
	AgentHealthPort           int            `key:"agent-health-port" default:"9879" section:"Agent" doc:"Port of the agent's /healthz on 127.0.0.1."`
	OperatorAPIServeAddr      string         `key:"operator-api-serve-addr" default:"127.0.0.1:9234" section:"Agent" doc:"Address and port of the operator's /healthz."`
	StateDir                  string         `key:"state-dir" default:"/var/run/lash/state" section:"Agent" doc:"Directory for the checkpoints of endpoints."`
	SocketPath                string         `key:"socket-path" default:"/var/run/lash/lash.sock" section:"Agent" doc:"Socket of the agent's API, which the lash command uses."`
	CNISocketPath             string         `key:"cni-socket-path" default:"/var/run/lash/cni.sock" section:"Agent" doc:"Socket the CNI plugin talks to."`

	sources map[string]Source
	notes   []string
}

// PortRange is an inclusive range of ports, First <= Last.
type PortRange struct{ First, Last uint16 }

// Source says where the value of a key comes from.
type Source struct {
	Kind string // "default", "file" or "flag"
	Name string // the file's path, or the flag as given; empty for a default
}

func (s Source) String() string {
	if s.Name == "" {
		return s.Kind
	}
	return s.Kind + " " + s.Name
}

// Default returns the configuration nobody touched. It is valid.
func Default() *Config {
	c := &Config{sources: map[string]Source{}}
	for _, o := range options() {
		if err := o.set(c, o.Default); err != nil {
			panic("config: default of " + o.Key + ": " + err.Error()) // a wrong tag above; any test finds it
		}
		c.sources[o.Key] = Source{Kind: "default"}
	}
	return c
}

// Source returns where the value of key comes from; the zero Source if there is no such key.
func (c *Config) Source(key string) Source { return c.sources[key] }

// Notes returns what the user should know about the configuration though it is valid: old spellings and what they
// became, keys without meaning here, values that are suspicious together.
func (c *Config) Notes() []string { return c.notes }

// Dump returns one line a key in the form the field's agents print at start: --enable-ipv4='true', sorted by key.
func (c *Config) Dump() []string {
	var lines []string
	for _, o := range optionsByKey() {
		lines = append(lines, "--"+o.Key+"='"+o.get(c)+"'")
	}
	return lines
}

// Get returns the value of key in the form it is written in the ConfigMap, and whether there is such a key.
func (c *Config) Get(key string) (string, bool) {
	o, ok := lookup(key)
	if !ok {
		return "", false
	}
	return o.get(c), true
}

// Encapsulation overheads in bytes: outer IP, UDP and VXLAN or Geneve headers, and the inner Ethernet header.
const (
	overheadIPv4 = 20 + 8 + 8 + 14
	overheadIPv6 = 40 + 8 + 8 + 14
)

const genevePort = 6081 // IANA

// Tunnel reports whether this node encapsulates packets to other nodes' pods, if to all of them or not.
func (c *Config) Tunnel() bool { return c.RoutingMode != "native" }

// TunnelUDPPort is the UDP port of the tunnel.
func (c *Config) TunnelUDPPort() uint16 {
	switch {
	case c.TunnelPort != 0:
		return uint16(c.TunnelPort)
	case c.TunnelProtocol == "geneve":
		return genevePort
	}
	return 8472
}

// DSRPort is the UDP port at which nodes take packets in Geneve that tell the frontend of a connection.
func (c *Config) DSRPort() uint16 {
	if c.TunnelProtocol == "geneve" {
		return c.TunnelUDPPort()
	}
	return genevePort
}

// UnderlayIPv6 reports whether the tunnel runs between the nodes' IPv6 addresses.
func (c *Config) UnderlayIPv6() bool {
	return c.UnderlayProtocol == "ipv6" || c.UnderlayProtocol == "auto" && !c.EnableIPv4
}

// TunnelOverhead is how many bytes of the MTU of the nodes' network the tunnel takes.
func (c *Config) TunnelOverhead() int {
	if c.UnderlayIPv6() {
		return overheadIPv6
	}
	return overheadIPv4
}

// MasqueradeExclusion returns the destinations that are not masqueraded: the native routing CIDR of the family if
// set, else the pools of cluster-pool, else nothing (the caller adds the pod CIDRs it knows).
func (c *Config) MasqueradeExclusion(ipv6 bool) []netip.Prefix {
	cidr, pools := c.IPv4NativeRoutingCIDR, c.ClusterPoolIPv4CIDR
	if ipv6 {
		cidr, pools = c.IPv6NativeRoutingCIDR, c.ClusterPoolIPv6CIDR
	}
	switch {
	case cidr.IsValid():
		return []netip.Prefix{cidr}
	case c.IPAM == "cluster-pool":
		return pools
	}
	return nil
}
