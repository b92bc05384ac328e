// SPDX-License-Identifier: Apache-2.0

package k8s

import (
	"fmt"
	"net/netip"
	"slices"
	"strconv"
	"strings"
	"unicode"
	"unique"

	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"

	v2 "github.com/lash-net/lash/api/v2"
	"github.com/lash-net/lash/internal/model"
	"github.com/lash-net/lash/internal/state"
)

// problems collects what is wrong with one object.
type problems []string // pairs of field and text

func (p *problems) add(field, format string, args ...any) {
	*p = append(*p, field, fmt.Sprintf(format, args...))
}

func (p *problems) addr(field, s string) (netip.Addr, bool) {
	a, err := netip.ParseAddr(s)
	if err != nil || a.Zone() != "" {
		p.add(field, "%q is no IP address", s)
		return netip.Addr{}, false
	}
	return a.Unmap(), true
}

func (p *problems) cidr(field, s string) (netip.Prefix, bool) {
	c, err := netip.ParsePrefix(s)
	if err != nil {
		p.add(field, "%q is no CIDR, like 10.0.1.0/24", s)
		return netip.Prefix{}, false
	}
	if c.Masked() != c {
		p.add(field, "%s has bits set after its prefix; %s is used", c, c.Masked())
	}
	return c.Masked(), true
}

// nonMasqueradeAnnotation lists destinations to which the pods of a node keep their addresses, separated by commas.
const nonMasqueradeAnnotation = "lash.io/non-masquerade-cidrs"

// leavingTaint is the autoscaler's on a node that it is about to remove; proxies tell load balancers (KEP-3836).
const leavingTaint = "ToBeDeletedByClusterAutoscaler"

// nodeConverter is convertNode, with the labels of the node named local: those of all others would only take memory.
func nodeConverter(local string) func(*corev1.Node) (state.NodeObject, problems) {
	return func(n *corev1.Node) (state.NodeObject, problems) {
		row, p := convertNode(n)
		if n.Name == local {
			row.Labels = n.Labels
		}
		return row, p
	}
}

func convertNode(n *corev1.Node) (state.NodeObject, problems) {
	var p problems
	row := state.NodeObject{Source: model.SourceKubernetes, Name: n.Name, UID: string(n.UID)}
	for i, a := range n.Status.Addresses {
		if a.Type != corev1.NodeInternalIP {
			continue
		}
		if addr, ok := p.addr(fmt.Sprintf("status.addresses[%d].address", i), a.Address); ok {
			row.Addrs = append(row.Addrs, addr)
		}
	}
	cidrs, field := n.Spec.PodCIDRs, "spec.podCIDRs[%d]"
	if len(cidrs) == 0 && n.Spec.PodCIDR != "" {
		cidrs, field = []string{n.Spec.PodCIDR}, "spec.podCIDR"
	}
	for i, s := range cidrs {
		f := field
		if strings.Contains(f, "%d") {
			f = fmt.Sprintf(f, i)
		}
		if c, ok := p.cidr(f, s); ok {
			row.PodCIDRs = append(row.PodCIDRs, c)
		}
	}
	field = "metadata.annotations[" + nonMasqueradeAnnotation + "]"
	for _, s := range strings.FieldsFunc(n.Annotations[nonMasqueradeAnnotation], func(r rune) bool { return r == ',' || unicode.IsSpace(r) }) {
		if c, ok := p.cidr(field, s); ok {
			row.NonMasquerade = append(row.NonMasquerade, c)
		}
	}
	row.Zone = n.Labels[corev1.LabelTopologyZone]
	for _, t := range n.Spec.Taints {
		row.Taints = append(row.Taints, t.Key)
	}
	row.Leaving = n.DeletionTimestamp != nil || slices.Contains(row.Taints, leavingTaint)
	for _, c := range n.Status.Conditions {
		row.NetworkOK = row.NetworkOK || c.Type == corev1.NodeNetworkUnavailable && c.Status == corev1.ConditionFalse
	}
	return row, p
}

func convertCiliumNode(n *v2.CiliumNode) (state.NodeObject, problems) {
	var p problems
	row := state.NodeObject{Source: model.SourceCustomResource, Name: n.Name, UID: string(n.UID), Tunnel: n.Annotations[v2.TunnelAnnotation], Error: n.Status.IPAM.OperatorStatus.Error}
	for i, a := range n.Spec.Addresses {
		var dst *[]netip.Addr
		switch a.Type {
		case v2.InternalIP:
			dst = &row.Addrs
		case v2.CiliumInternalIP:
			dst = &row.Routers
		default:
			continue
		}
		if addr, ok := p.addr(fmt.Sprintf("spec.addresses[%d].ip", i), a.IP); ok {
			*dst = append(*dst, addr)
		}
	}
	for _, h := range [...]struct{ field, ip string }{{"spec.health.ipv4", n.Spec.Health.IPv4}, {"spec.health.ipv6", n.Spec.Health.IPv6}} {
		if h.ip == "" {
			continue
		}
		if addr, ok := p.addr(h.field, h.ip); ok {
			row.Health = append(row.Health, addr)
		}
	}
	for i, s := range n.Spec.IPAM.PodCIDRs {
		if c, ok := p.cidr(fmt.Sprintf("spec.ipam.podCIDRs[%d]", i), s); ok {
			row.PodCIDRs = append(row.PodCIDRs, c)
		}
	}
	for _, ref := range n.OwnerReferences {
		if ref.Kind == "Node" {
			row.OwnerUID = string(ref.UID)
		}
	}
	return row, p
}

// sockmapAnnotation asks that connections between the containers of a pod exchange small messages by a BPF sockmap, without
// packets.
const sockmapAnnotation = "lash.io/sockmap"

func convertPod(pod *corev1.Pod) (state.Pod, problems) {
	var p problems
	row := state.Pod{
		Namespace: pod.Namespace, Name: pod.Name, UID: string(pod.UID),
		HostNetwork: pod.Spec.HostNetwork, Phase: string(pod.Status.Phase), Labels: pod.Labels,
		ServiceAccount: pod.Spec.ServiceAccountName, Terminating: pod.DeletionTimestamp != nil, Created: pod.CreationTimestamp.Unix(),
	}
	_, row.Mirror = pod.Annotations[corev1.MirrorPodAnnotationKey]
	if text, ok := pod.Annotations[sockmapAnnotation]; ok {
		asked, err := strconv.ParseBool(text)
		if err != nil {
			p.add("metadata.annotations["+sockmapAnnotation+"]", "%q is neither true nor false", text)
		}
		row.Sockmap = asked && !row.HostNetwork
		if asked && row.HostNetwork {
			p.add("metadata.annotations["+sockmapAnnotation+"]", "has no effect on a pod in the node's network namespace")
		}
	}
	for _, ref := range pod.OwnerReferences {
		row.Controlled = row.Controlled || ref.Controller != nil && *ref.Controller && ref.Kind != "Node"
	}
	for i, ip := range pod.Status.PodIPs {
		if a, ok := p.addr(fmt.Sprintf("status.podIPs[%d].ip", i), ip.IP); ok {
			row.IPs = append(row.IPs, a)
		}
	}
	containers := func(field string, list []corev1.Container) {
		for i, c := range list {
			for j, port := range c.Ports {
				p.podPort(fmt.Sprintf("spec.%s[%d].ports[%d]", field, i, j), port, pod.Spec.HostNetwork, &row.Ports)
			}
		}
	}
	containers("initContainers", sidecars(pod.Spec.InitContainers))
	containers("containers", pod.Spec.Containers)
	for _, cs := range pod.Status.ContainerStatuses {
		row.Running = row.Running || cs.State.Running != nil
	}
	return row, p
}

// sidecars are the init containers that go on running; the others are emptied, so that they keep their index.
func sidecars(list []corev1.Container) []corev1.Container {
	list = slices.Clone(list)
	for i, c := range list {
		if c.RestartPolicy == nil || *c.RestartPolicy != corev1.ContainerRestartPolicyAlways {
			list[i] = corev1.Container{}
		}
	}
	return list
}

// podPort adds a port that has a name or, in a pod with a network of its own, a HostPort.
func (p *problems) podPort(field string, port corev1.ContainerPort, hostNetwork bool, out *[]state.PodPort) {
	proto, ok := protocol(port.Protocol)
	if !ok {
		p.add(field+".protocol", "%q is none of TCP, UDP, SCTP", port.Protocol)
		return
	}
	row := state.PodPort{Name: port.Name, L4: model.L4{Proto: proto, Port: uint16(port.ContainerPort)}}
	if port.ContainerPort < 1 || port.ContainerPort > 65535 {
		p.add(field+".containerPort", "%d is no port from 1 to 65535", port.ContainerPort)
		return
	}
	if port.HostPort != 0 && !hostNetwork {
		if port.HostPort < 1 || port.HostPort > 65535 {
			p.add(field+".hostPort", "%d is no port from 1 to 65535", port.HostPort)
			return
		}
		row.HostPort = uint16(port.HostPort)
		if port.HostIP != "" {
			if row.HostIP, ok = p.addr(field+".hostIP", port.HostIP); !ok {
				return
			}
		}
	}
	if row.Name != "" || row.HostPort != 0 {
		*out = append(*out, row)
	}
}

// sliceController is who manages the slices that are made of a service's selector.
const sliceController = "endpointslice-controller.k8s.io"

var broadcast = netip.AddrFrom4([4]byte{255, 255, 255, 255})

func convertSlice(s *discoveryv1.EndpointSlice) (state.EndpointSlice, problems) {
	var p problems
	row := state.EndpointSlice{Namespace: s.Namespace, Name: s.Name, UID: string(s.UID), Service: s.Labels[discoveryv1.LabelServiceName], Derived: s.Labels[discoveryv1.LabelManagedBy] == sliceController}
	switch s.AddressType {
	case discoveryv1.AddressTypeIPv4:
	case discoveryv1.AddressTypeIPv6:
		row.IPv6 = true
	default:
		p.add("addressType", "%q is none of IPv4, IPv6: nothing that a packet could be sent to", s.AddressType)
		return row, p
	}
	for i, sp := range s.Ports {
		name, port, proto := "", int32(0), corev1.ProtocolTCP
		if sp.Name != nil {
			name = *sp.Name
		}
		if sp.Port != nil {
			port = *sp.Port
		}
		if sp.Protocol != nil {
			proto = *sp.Protocol
		}
		number, ok := protocol(proto)
		if !ok {
			p.add(fmt.Sprintf("ports[%d].protocol", i), "%q is none of TCP, UDP, SCTP", proto)
			continue
		}
		if sp.Port == nil {
			p.add(fmt.Sprintf("ports[%d].port", i), "is missing")
			continue
		}
		if port < 1 || port > 65535 {
			p.add(fmt.Sprintf("ports[%d].port", i), "%d is no port from 1 to 65535", port)
			continue
		}
		row.Ports = append(row.Ports, state.SlicePort{Name: name, L4: model.L4{Proto: number, Port: uint16(port)}})
	}
	for i, e := range s.Endpoints {
		// All addresses of an endpoint stand for the same pod, and consumers use the first (discovery/v1).
		if len(e.Addresses) == 0 {
			p.add(fmt.Sprintf("endpoints[%d].addresses", i), "is empty")
			continue
		}
		a, ok := p.addr(fmt.Sprintf("endpoints[%d].addresses[0]", i), e.Addresses[0])
		if !ok {
			continue
		}
		if a.Is6() != row.IPv6 {
			p.add(fmt.Sprintf("endpoints[%d].addresses[0]", i), "%s is not of addressType %s", a, s.AddressType)
			continue
		}
		if a.IsUnspecified() || a.IsLoopback() || a.IsMulticast() || a.IsLinkLocalUnicast() || a == broadcast {
			p.add(fmt.Sprintf("endpoints[%d].addresses[0]", i), "%s is no address of a pod or a machine", a)
			continue
		}
		ready := e.Conditions.Ready == nil || *e.Conditions.Ready
		se := state.SliceEndpoint{
			Addr: a, Ready: ready, Serving: ready,
			Terminating: e.Conditions.Terminating != nil && *e.Conditions.Terminating,
		}
		if e.Conditions.Serving != nil {
			se.Serving = *e.Conditions.Serving
		}
		if e.NodeName != nil {
			se.Node = unique.Make(*e.NodeName).Value() // few nodes, many endpoints
		}
		if h := hints(e.Hints); h != nil {
			if n := len(row.Endpoints); n > 0 && h.Equal(row.Endpoints[n-1].Hints) {
				h = row.Endpoints[n-1].Hints
			}
			se.Hints = h
		}
		row.Endpoints = append(row.Endpoints, se)
	}
	return row, p
}

// hints are those of an endpoint; nil: it has none.
func hints(h *discoveryv1.EndpointHints) *state.Hints {
	if h == nil || len(h.ForZones)+len(h.ForNodes) == 0 {
		return nil
	}
	out := &state.Hints{}
	for _, z := range h.ForZones {
		out.Zones = append(out.Zones, z.Name)
	}
	for _, n := range h.ForNodes {
		out.Nodes = append(out.Nodes, n.Name)
	}
	return out
}

func protocol(p corev1.Protocol) (uint8, bool) {
	switch p {
	case corev1.ProtocolTCP, "":
		return model.ProtoTCP, true
	case corev1.ProtocolUDP:
		return model.ProtoUDP, true
	case corev1.ProtocolSCTP:
		return model.ProtoSCTP, true
	}
	return 0, false
}
