// SPDX-License-Identifier: Apache-2.0

package agent

import "net/netip"

// ExplainRequest asks what becomes of a packet from Src to Dst: each a pod ([pod/]NAMESPACE/NAME), a service
// (svc/NAMESPACE/NAME or NAME.NAMESPACE.svc), a node (its name or node/NAME) or an address. An agent resolves names.
type ExplainRequest struct {
	Src        string     `json:"src"`
	Dst        string     `json:"dst"`
	Port       uint16     `json:"port,omitempty"`       // of Dst; 0: a service's only one
	Proto      string     `json:"proto,omitempty"`      // tcp, udp, sctp or icmp; empty: tcp with a port, else icmp
	SourcePort uint16     `json:"sourcePort,omitempty"` // of icmp the identifier; 0: one that no connection has
	SourceIP   netip.Addr `json:"sourceIP,omitzero"`    // instead of the pod's own
	Family     int        `json:"family,omitempty"`     // 4 or 6; 0: that of a given address, else IPv4 if both ends have it
	TTL        uint8      `json:"ttl,omitempty"`        // 0: 64
	Size       int        `json:"size,omitempty"`       // of the payload, bytes
	Node       string     `json:"node,omitempty"`       // where a packet from outside of the cluster arrives; empty: at Dst's
	Device     string     `json:"device,omitempty"`     // of this agent's node, where the packet was seen: name or number
	Fresh      bool       `json:"fresh,omitempty"`      // as a new connection, whatever is remembered of it
	All        bool       `json:"all,omitempty"`        // every backend of a service, not the first alone
}

// Explanation is one packet's way, or that of one packet for each backend.
type Explanation struct {
	Ways []ExplainedWay `json:"ways"`
}

// ExplainedWay is what becomes of a packet, step by step.
type ExplainedWay struct {
	Src     ExplainedEnd   `json:"src"`
	Dst     ExplainedEnd   `json:"dst"`
	Steps   []ExplainStep  `json:"steps"`
	Verdict ExplainVerdict `json:"verdict"`
}

// ExplainedEnd is what a name or an address was found to be.
type ExplainedEnd struct {
	Addr   netip.Addr `json:"addr"`
	Object string     `json:"object,omitempty"` // "pod demo/web-1", "node n1"; empty: outside of the cluster
	Node   string     `json:"node,omitempty"`
}

// ExplainStep is one program's work, or the kernel's between two programs.
type ExplainStep struct {
	Node    string         `json:"node"`
	Program string         `json:"program"` // from_container ..., connect4, or stack
	Device  string         `json:"device,omitempty"`
	Tag     string         `json:"tag,omitempty"`     // the kernel's, of the program that is attached
	Why     []string       `json:"why,omitempty"`     // fast path, or the reasons of the slow one
	Packet  string         `json:"packet,omitempty"`  // as it comes in
	Entries []ExplainEntry `json:"entries,omitempty"` // what was looked up
	Changes []string       `json:"changes,omitempty"` // of the headers
	Record  *ExplainRecord `json:"record,omitempty"`  // of the connection, as this packet leaves it
	Points  []string       `json:"points,omitempty"`  // the events that a real packet would make
	Result  string         `json:"result"`
}

// ExplainEntry is a row of a map, or of the routing table, and the Kubernetes object behind it.
type ExplainEntry struct {
	Map     string `json:"map"` // lash_ipcache ..., or route
	Key     string `json:"key"`
	Value   string `json:"value"`
	Object  string `json:"object,omitempty"`
	Decides bool   `json:"decides,omitempty"` // the result follows from this one
}

// ExplainRecord is a connection's decision for each direction.
type ExplainRecord struct {
	Connection string `json:"connection"`
	State      string `json:"state"`
	Forth      string `json:"forth"` // of the packets of the initiator
	Back       string `json:"back"`
	NAT        string `json:"nat,omitempty"`     // the initiator's masqueraded address
	Backend    string `json:"backend,omitempty"` // of a service, where the packets go in its name
}

// What becomes of a packet.
const (
	OutcomeDelivered = "delivered" // into a pod
	OutcomeHost      = "host"      // to a node's own processes
	OutcomeSent      = "sent"      // out of a device towards what is no node of the cluster
	OutcomeDropped   = "dropped"   // by a program
	OutcomeAnswered  = "answered"  // by a node's IP stack, with an ICMP error
	OutcomeRefused   = "refused"   // the service has no backend, or no such port: at the socket, or by a node's IP stack
	OutcomeUnknown   = "unknown"   // it goes to a node whose agent could not be asked
)

// ReasonNeighbour is of a packet that waits until the next hop's MAC address is known: it is sent if NextHop answers.
const ReasonNeighbour = "neighbour unknown"

// ExplainVerdict is what becomes of a packet in the end.
type ExplainVerdict struct {
	Outcome string     `json:"outcome"`
	Node    string     `json:"node"`             // where
	Pod     string     `json:"pod,omitempty"`    // delivered: namespace/name
	Device  string     `json:"device,omitempty"` // delivered and sent: by which it leaves the node
	NextHop netip.Addr `json:"nextHop,omitzero"` // sent: whose MAC address it is sent to
	Reason  string     `json:"reason,omitempty"` // dropped, answered, unknown; sent: ReasonNeighbour
	File    string     `json:"file,omitempty"`   // dropped: where in the source
	Line    uint16     `json:"line,omitempty"`
	Packet  string     `json:"packet,omitempty"` // as it is in the end
	Text    string     `json:"text"`
	Remedy  string     `json:"remedy,omitempty"`
}

// Where an ExplainHop begins.
const (
	FromPod     = "pod"
	FromHost    = "host"
	FromNetwork = "network"
	FromTunnel  = "tunnel"
)

// ExplainHop asks a node for its part of a packet's way. Agents ask each other.
type ExplainHop struct {
	From    string         `json:"from"`
	Packet  *ExplainPacket `json:"packet,omitempty"` // where the way begins
	Frame   []byte         `json:"frame,omitempty"`  // where it goes on: as the node before sent it
	Sender  netip.Addr     `json:"sender,omitzero"`  // of a packet from the tunnel: the node, by its outer address
	VNI     uint32         `json:"vni,omitempty"`
	Backend int            `json:"backend,omitempty"` // which one of a service's, from 0
	Fresh   bool           `json:"fresh,omitempty"`
}

// ExplainPacket is a packet before it is one.
type ExplainPacket struct {
	Pod        netip.Addr `json:"pod,omitzero"` // the pod that sends it
	Src        netip.Addr `json:"src,omitzero"` // invalid: the node's stack chooses
	Dst        netip.Addr `json:"dst"`
	Proto      string     `json:"proto"`
	SourcePort uint16     `json:"sourcePort,omitempty"`
	Port       uint16     `json:"port,omitempty"`
	TTL        uint8      `json:"ttl"`
	Size       int        `json:"size,omitempty"`
}

// ExplainHopAnswer is a node's part: either a verdict, or who is to be asked next.
type ExplainHopAnswer struct {
	Src      netip.Addr      `json:"src,omitzero"` // as the node's stack chose it
	Steps    []ExplainStep   `json:"steps"`
	Backends int             `json:"backends,omitempty"` // of the service that was translated
	Verdict  *ExplainVerdict `json:"verdict,omitempty"`
	NextNode string          `json:"nextNode,omitempty"`
	Next     *ExplainHop     `json:"next,omitempty"`
}
