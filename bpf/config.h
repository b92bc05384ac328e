/* SPDX-License-Identifier: GPL-2.0 OR BSD-2-Clause */
/* CONFIG(type, name, "doc") declares a load-time constant: the agent sets it
 * before the kernel sees the program, the verifier then knows its value and
 * removes the branches it rules out. This replaces #ifdef. The documentation
 * travels in the object's BTF and from there into package bpf. */
#ifndef LASH_CONFIG_H
#define LASH_CONFIG_H

#define CONFIG(type, name, doc) \
	const volatile type cfg_##name __attribute__((btf_decl_tag("doc:" doc)))

/* Constants that every program of the node shares. */
CONFIG(__u32, hz, "kernel ticks a second (CONFIG_HZ), the unit of every deadline");
CONFIG(__u32, ct_tcp_ticks, "lifetime of an established TCP connection without packets, ticks");
CONFIG(__u32, ct_syn_ticks, "lifetime of a TCP connection before it is answered, ticks");
CONFIG(__u32, ct_close_ticks, "lifetime of a TCP connection after FIN in both directions or RST, ticks");
CONFIG(__u32, ct_any_ticks, "lifetime of every other connection without packets, ticks");
CONFIG(__u32, host_ifindex, "ifindex of lash_host");
CONFIG(__u64, host_mac, "MAC address of lash_host, first byte lowest");
CONFIG(__u32, direct_ifindex, "device that routes to other nodes, used where the kernel's FIB answer names none");
CONFIG(__u32, overlay_ifindex, "ifindex of the tunnel device; 0: there is none");
CONFIG(__u32, tunnel_mtu, "bytes that a packet in the tunnel may have");
CONFIG(__u32, tunnel_port, "UDP port of the tunnel");
CONFIG(bool, tunnel_geneve, "true: the tunnel's protocol is Geneve; false: VXLAN");
CONFIG(bool, host_routing, "true: BPF host routing; false: legacy, remote packets go through the host's stack");
CONFIG(bool, masquerade4, "SNAT of pods' IPv4 traffic that leaves the cluster");
CONFIG(bool, masquerade6, "SNAT of pods' IPv6 traffic that leaves the cluster");
CONFIG(struct addr, native4_net, "IPv4 native routing CIDR, never masqueraded (IPv4-mapped)");
CONFIG(struct addr, native4_mask, "its mask; all zero: not set");
CONFIG(struct addr, native6_net, "IPv6 native routing CIDR, never masqueraded");
CONFIG(struct addr, native6_mask, "its mask; all zero: not set");
CONFIG(struct addr, pod4_net, "this node's IPv4 pod CIDR (IPv4-mapped)");
CONFIG(struct addr, pod4_mask, "its mask; all zero: not set, every address is looked up");
CONFIG(struct addr, pod6_net, "this node's IPv6 pod CIDR");
CONFIG(struct addr, pod6_mask, "its mask; all zero: not set, every address is looked up");
CONFIG(struct addr, router4, "the pods' IPv4 gateway (IPv4-mapped)");
CONFIG(struct addr, router6, "the pods' IPv6 gateway");
CONFIG(__u32, snat_min, "first source port for masquerading");
CONFIG(__u32, snat_max, "last source port for masquerading");
CONFIG(__u32, snat_far_min, "first of those that are used too when there is none left of the others");
CONFIG(__u32, snat_far_max, "last of those; 0: there are none");
CONFIG(struct addr, node4, "the node's IPv4 address on the direct device (IPv4-mapped): told apart from services' without a lookup");
CONFIG(struct addr, node6, "the same for IPv6");
CONFIG(bool, services, "true: packets that ask for services are served; false: kube-proxy does it");
CONFIG(bool, lb_outside_cluster_ip, "true: packets from outside reach ClusterIPs too");
CONFIG(bool, lb_refuse, "true: connections to services without backends are refused; false: dropped");
CONFIG(bool, dsr, "true: nodes tell each other the frontend of a connection in an option, and it is believed");
CONFIG(bool, dsr_geneve, "true: in an option of Geneve around the packet; false: in an IP option. Either is understood");
CONFIG(__u32, dsr_port, "UDP port for Geneve that tells frontends");
CONFIG(__u32, xdp_cpus, "XDP spreads what it passes to the kernel over CPUs below this number; 0: it does not");
CONFIG(__u32, maglev_size, "entries of a table of lash_maglev");
CONFIG(__u64, host_netns, "cookie of the node's network namespace");
CONFIG(bool, sock_host_only, "true: services are translated at sockets of the node's network namespace only");
CONFIG(__u32, events_wake, "unread bytes of lash_events after which its reader is woken, a power of two");
CONFIG(bool, have_set_retval, "bpf_set_retval exists (5.18): connect() to a service without backends fails with ECONNREFUSED, not EPERM");

#endif
