// SPDX-License-Identifier: Apache-2.0

package k8s

import (
	"fmt"
	"net/netip"
	"slices"
	"strings"

	corev1 "k8s.io/api/core/v1"

	"github.com/lash-net/lash/internal/model"
	"github.com/lash-net/lash/internal/state"
)

const maxAffinitySeconds = 24 * 60 * 60 // Kubernetes' own bound

// addrs reads a list of addresses of which those that cannot be read are left out.
func (p *problems) addrs(field string, list []string) (out []netip.Addr) {
	for i, s := range list {
		a, ok := p.addr(fmt.Sprintf("%s[%d]", field, i), s)
		switch {
		case !ok:
		case a.IsUnspecified() || a.IsMulticast():
			p.add(fmt.Sprintf("%s[%d]", field, i), "%s is no address that can be served", a)
		default:
			out = append(out, a)
		}
	}
	return out
}

func convertService(svc *corev1.Service) (state.Service, problems) {
	var p problems
	row := state.Service{
		Namespace: svc.Namespace, Name: svc.Name, UID: string(svc.UID), Created: svc.CreationTimestamp.Unix(), Type: string(svc.Spec.Type),
		PublishNotReady: svc.Spec.PublishNotReadyAddresses,
		InternalLocal:   svc.Spec.InternalTrafficPolicy != nil && *svc.Spec.InternalTrafficPolicy == corev1.ServiceInternalTrafficPolicyLocal,
		ExternalLocal:   svc.Spec.ExternalTrafficPolicy == corev1.ServiceExternalTrafficPolicyLocal,
	}
	if row.Type == "" {
		row.Type = string(corev1.ServiceTypeClusterIP)
	}
	p.annotations(svc, &row)
	if svc.Spec.SessionAffinity == corev1.ServiceAffinityClientIP {
		row.SessionAffinitySec = int(corev1.DefaultClientIPServiceAffinitySeconds)
		if c := svc.Spec.SessionAffinityConfig; c != nil && c.ClientIP != nil && c.ClientIP.TimeoutSeconds != nil {
			if s := *c.ClientIP.TimeoutSeconds; s > 0 && s <= maxAffinitySeconds {
				row.SessionAffinitySec = int(s)
			} else {
				p.add("spec.sessionAffinityConfig.clientIP.timeoutSeconds", "%d is not from 1 to %d; %d is used", s, maxAffinitySeconds, row.SessionAffinitySec)
			}
		}
	}
	ips := svc.Spec.ClusterIPs
	if len(ips) == 0 && svc.Spec.ClusterIP != "" {
		ips = []string{svc.Spec.ClusterIP}
	}
	if !slices.Contains(ips, corev1.ClusterIPNone) && !slices.Contains(ips, "") {
		row.ClusterIPs = p.addrs("spec.clusterIPs", ips)
	}
	row.ExternalIPs = p.addrs("spec.externalIPs", svc.Spec.ExternalIPs)
	if svc.Spec.Type == corev1.ServiceTypeLoadBalancer {
		p.loadBalancer(svc, &row)
	}
	p.servicePorts(svc, &row)
	return row, p
}

// loadBalancer reads what only services of this type have. Who gives the addresses is not asked: those in the status are
// served, whichever class the service has.
func (p *problems) loadBalancer(svc *corev1.Service, row *state.Service) {
	for i, in := range svc.Status.LoadBalancer.Ingress {
		// A load balancer that is a proxy gets the packets for its address: the node must not serve it.
		if in.IP == "" || in.IPMode != nil && *in.IPMode == corev1.LoadBalancerIPModeProxy {
			continue
		}
		if a, ok := p.addr(fmt.Sprintf("status.loadBalancer.ingress[%d].ip", i), in.IP); ok {
			row.LoadBalancerIPs = append(row.LoadBalancerIPs, a)
		}
	}
	if n := svc.Spec.HealthCheckNodePort; row.ExternalLocal && n != 0 {
		if n < 1 || n > 65535 {
			p.add("spec.healthCheckNodePort", "%d is no port from 1 to 65535", n)
		} else {
			row.HealthCheckNodePort = uint16(n)
		}
	}
	ranges, field := svc.Spec.LoadBalancerSourceRanges, "spec.loadBalancerSourceRanges"
	if s := svc.Annotations[corev1.AnnotationLoadBalancerSourceRangesKey]; len(ranges) == 0 && strings.TrimSpace(s) != "" {
		ranges, field = strings.Split(s, ","), "metadata.annotations["+corev1.AnnotationLoadBalancerSourceRangesKey+"]"
	}
	for i, s := range ranges {
		c, err := netip.ParsePrefix(strings.TrimSpace(s))
		if err != nil {
			p.add(fmt.Sprintf("%s[%d]", field, i), "%q is no CIDR, like 10.0.1.0/24; it %s", s, map[bool]string{false: "lets nobody in", true: "keeps nobody out"}[row.RangesDeny])
			row.RangesBroken = true
			continue
		}
		row.SourceRanges = append(row.SourceRanges, c.Masked())
	}
}

func (p *problems) servicePorts(svc *corev1.Service, row *state.Service) {
	type named struct {
		model.L4
		name string
	}
	seen := map[any]int{}
	for i, sp := range svc.Spec.Ports {
		field := fmt.Sprintf("spec.ports[%d]", i)
		proto, ok := protocol(sp.Protocol)
		if !ok {
			p.add(field+".protocol", "%q is none of TCP, UDP, SCTP", sp.Protocol)
			continue
		}
		if sp.Port < 1 || sp.Port > 65535 {
			p.add(field+".port", "%d is no port from 1 to 65535", sp.Port)
			continue
		}
		port := state.ServicePortSpec{Name: sp.Name, L4: model.L4{Proto: proto, Port: uint16(sp.Port)}}
		if first, twice := seen[port.L4]; twice {
			p.add(field+".port", "%d/%s is that of spec.ports[%d], too", sp.Port, model.ProtoName(proto), first)
			continue
		}
		if first, twice := seen[named{model.L4{Proto: proto}, sp.Name}]; twice {
			p.add(field+".name", "%q is that of spec.ports[%d], too", sp.Name, first)
			continue
		}
		seen[port.L4], seen[named{model.L4{Proto: proto}, sp.Name}] = i, i
		switch {
		case svc.Spec.Type != corev1.ServiceTypeNodePort && svc.Spec.Type != corev1.ServiceTypeLoadBalancer:
		case sp.NodePort < 0 || sp.NodePort > 65535:
			p.add(field+".nodePort", "%d is no port from 1 to 65535", sp.NodePort)
		default:
			port.NodePort = uint16(sp.NodePort)
		}
		row.Ports = append(row.Ports, port)
	}
}
