/* SPDX-License-Identifier: GPL-2.0 OR BSD-2-Clause */
/* Every map, with its key and value. All are pinned below /sys/fs/bpf/lash/maps
 * under their own names and outlive the agent. Addresses are 16 bytes in network
 * order, IPv4 as ::ffff:a.b.c.d, so that both families share each map. */
#ifndef LASH_MAPS_H
#define LASH_MAPS_H

#include "include/helpers.h"

struct addr {
	union {
		__u8  b[16];
		__u32 w[4];
		__u64 d[2];
	};
};

#include "config.h"

struct mac {
	__u8 b[6];
};

/* --- lash_runtime: the one row that the agent changes under running programs.
 * Agent writes; the clock program writes ticks; every program reads. */
enum event_switches {
	EVENTS_DROP    = 1,
	EVENTS_TRACE   = 2,
	EVENTS_DEBUG   = 4,
	EVENTS_VERDICT = 8,
};

enum aggregation {
	AGGREGATE_NONE,          /* every packet, where it came from and where it goes */
	AGGREGATE_LOW,           /* every packet, where it goes */
	AGGREGATE_MEDIUM,        /* of a connection's direction: the first, new TCP flags, each interval */
	AGGREGATE_MAXIMUM,       /* the same without interval */
};

/* What makes a packet worth an event, as struct runtime.report masks it: its TCP
 * flags, that it is its direction's first, that it is there. */
enum report {
	REPORT_FLAGS = 0xff,
	REPORT_EVERY = 0x100,
	REPORT_FIRST = 0x200,
};

struct runtime {
	__u32 epoch;             /* raised after every change; older decisions are made again */
	__u32 interval;          /* ticks between events of one direction; 0: no such events */
	__u64 ticks;             /* jiffies when the clock program last ran */
	__u16 report;            /* enum report; 0: nobody listens */
	__u8 events;             /* enum event_switches; 0: nobody listens */
	__u8 aggregation;        /* enum aggregation */
	__u32 pad;
};

struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, struct runtime);
} lash_runtime SEC(".maps");

/* --- lash_endpoints: addresses that live on this node, pods' and the host's own.
 * Agent writes with the endpoint's life; slow path reads. */
enum endpoint_flags {
	ENDPOINT_HOST     = 1,   /* an address of the node itself: hand to the stack */
	ENDPOINT_NODEPORT = 2,   /* NodePorts are served on it */
};

struct endpoint {
	__u32 ifindex;           /* host side of the veth pair */
	__u32 identity;
	__u16 id;
	__u16 flags;             /* enum endpoint_flags */
	struct mac mac;          /* pod side */
	struct mac node_mac;     /* host side */
	__u8 pad[8];
};

struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__uint(max_entries, 65536);
	__type(key, struct addr);
	__type(value, struct endpoint);
} lash_endpoints SEC(".maps");

/* --- lash_ifaces: the endpoint behind a pod's device, for the source check and
 * the gateway's ARP and ND answers. Agent writes before it attaches the device. */
struct iface {
	struct addr ip4;         /* zero: the endpoint has none */
	struct addr ip6;
	__u32 identity;
	__u16 id;
	struct mac mac;
	struct mac node_mac;
	__u8 pad[6];
};

struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__uint(max_entries, 65536);
	__type(key, __u32);
	__type(value, struct iface);
} lash_ifaces SEC(".maps");

/* --- lash_devices: the node's own devices towards the network. Agent writes;
 * slow path reads for masquerading. */
struct device {
	struct addr ip4;         /* source address of masqueraded packets; zero: none */
	struct addr ip6;
	struct mac mac;
	__u16 mtu;
};

struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__uint(max_entries, 256);
	__type(key, __u32);
	__type(value, struct device);
} lash_devices SEC(".maps");

/* --- lash_ipcache: what an address is, cluster-wide, by longest prefix.
 * Agent writes; slow path reads. */
struct ipcache_key {
	__u32 prefixlen;         /* of the 128 bits of addr */
	struct addr addr;
} __attribute__((packed, aligned(4)));

enum ipcache_flags {
	IPCACHE_TUNNEL = 1,      /* packets to it are encapsulated to node */
	IPCACHE_PEER   = 2,      /* another node itself: its encapsulated packets are accepted */
};

struct ipcache_entry {
	__u32 identity;
	__u32 flags;             /* enum ipcache_flags */
	struct addr node;        /* the node that has it; zero: none or this one */
};

struct {
	__uint(type, BPF_MAP_TYPE_LPM_TRIE);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__uint(max_entries, 512000);
	__type(key, struct ipcache_key);
	__type(value, struct ipcache_entry);
} lash_ipcache SEC(".maps");

/* --- lash_conn: one record a connection. The slow path creates and decides, the
 * fast path follows and counts, the agent removes what has expired. Not an LRU:
 * a live connection is never evicted to make room. */
struct conn_key {
	struct addr lo;          /* the smaller (address, port), compared as raw words */
	struct addr hi;
	__be16 lo_port;          /* ICMP echo: the identifier on the requester's side, 0 on the other */
	__be16 hi_port;
	__u8 proto;
	__u8 kind;               /* enum key_kind */
	__u8 pending;            /* in a row of lash_nat: the claim is not sure yet. No record has such a key: the row leads nowhere */
	__u8 pad[1];
};

enum key_kind {
	KEY_TUPLE,
	KEY_NODE,                /* a connection of the node itself whose tuple, beyond the node, is another's */
	KEY_LOCK,                /* of lash_nat: the tuple's row is being removed; leads nowhere */
};

enum conn_action {
	ACTION_NONE,
	ACTION_PEER,             /* into the pod behind out_ifindex, skipping its host side */
	ACTION_EGRESS,           /* out of out_ifindex with these MACs */
	ACTION_HOST,             /* up the host's stack, through lash_host */
	ACTION_PASS,             /* up the host's stack, from here */
	ACTION_NEIGH,            /* never stored: out of out_ifindex, the kernel resolves the neighbour */
	ACTION_TUNNEL,           /* encapsulated to node, with identity vni */
};

enum dir_flags {
	DIR_TTL    = 1,          /* one hop: decrement TTL */
	DIR_TO_NAT = 2,          /* the tuple of the key becomes the translated one (CONN_NAT, CONN_DNAT) */
	DIR_NO_NAT = 4,          /* the translated tuple becomes that of the key */
	DIR_DSR    = 8,          /* the source, a backend, becomes to_addr:to_port, the frontend that was asked */
};

/* Where packets of a direction must arrive for its decision to hold: a pod's
 * ifindex, or one of these. A packet elsewhere is decided anew, source check included. */
enum conn_in {
	IN_NETDEV  = 0,
	IN_HOST    = 0xffffffff,
	IN_OVERLAY = 0xfffffffe, /* and from the node that the other direction goes to */
};

struct conn_dir {
	__u32 epoch;             /* of the decision; 0: none */
	__u32 deadline;          /* ticks (low half); past it the route is looked up again */
	__u32 in;                /* ifindex or enum conn_in */
	__u32 out_ifindex;
	__u8 action;             /* enum conn_action */
	__u8 flags;              /* enum dir_flags */
	__u16 mtu;               /* of the route; 0: no limit to check */
	__u32 vni;               /* ACTION_TUNNEL: the sender's identity */
	union {
		struct {
			struct mac dmac;
			struct mac smac;
		};
		struct addr node;    /* ACTION_TUNNEL: where to */
	};
	__u64 packets;           /* plain increments: one direction is one CPU's, nearly always */
	__u64 bytes;
	__u32 due;               /* ticks (low half); past it the next packet is worth an event */
	__u16 seen;              /* enum report, what events told already */
	__u16 seen_out;          /* the same for to_netdev, which packets reach by way of the stack */
};

enum conn_flags {
	CONN_INITIATOR_HI = 1,   /* the initiator is the key's hi side */
	CONN_NAT          = 2,   /* the initiator becomes nat_addr:nat_port; lash_nat leads back here */
	CONN_NO_NAT       = 4,   /* masquerading was considered and does not apply */
	CONN_DNAT         = 8,   /* the responder, a frontend, becomes to_addr:to_port; lash_nat leads back here */
	CONN_CLAIMED      = 32,  /* the translated tuple is this connection's: lash_nat has its row */
	CONN_DSR          = 16,  /* with CONN_DNAT: the backend answers the client itself; without: the initiator asked
	                          * for the frontend to_addr:to_port, which another node sent on */
	CONN_HOST         = 64,  /* with CONN_DNAT: the initiator is the node, whose sockets have ports on its address, too */
};

enum conn_state {
	STATE_REPLIED    = 1,
	STATE_FIN_ORIG   = 2,
	STATE_FIN_REPLY  = 4,
	STATE_CLOSED     = 8,    /* RST */
	STATE_RST_REPLY  = 16,   /* the responder's */
	STATE_FIN_BOTH   = STATE_FIN_ORIG | STATE_FIN_REPLY,
};

struct conn {
	struct conn_dir orig;    /* packets of the initiator */
	struct conn_dir reply;
	struct addr nat_addr;
	__be16 nat_port;
	__u8 flags;              /* enum conn_flags */
	__u8 state;              /* enum conn_state */
	__u32 expires;           /* ticks (low half) */
	__u32 created;           /* ticks (low half) */
	__u32 service;           /* CONN_DNAT: its number */
	struct addr to_addr;
	__be16 to_port;
	__u8 pad[6];
};

struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__uint(max_entries, 524288);
	__type(key, struct conn_key);
	__type(value, struct conn);
} lash_conn SEC(".maps");

/* --- lash_nat: the translated tuple of a connection (masquerading, services) leads to
 * its record. Written with the record, removed with it, under a lock: the row of the same
 * tuple with KEY_LOCK, which only one can make. */
struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__uint(max_entries, 262144);
	__type(key, struct conn_key);
	__type(value, struct conn_key);
} lash_nat SEC(".maps");

/* --- lash_snat_ports: when a port, or the identifier of an echo, was last claimed on an address of the
 * node for somebody else; 0: not since nobody has it. By it packets of the node's own sockets are
 * told apart without a search of lash_nat. Programs write; the agent clears, by compare and swap. */
struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(map_flags, BPF_F_MMAPABLE);
	__uint(max_entries, 65536);
	__type(key, __u32);
	__type(value, __u32);
} lash_snat_ports SEC(".maps");

/* --- lash_snat_full: destinations towards which no source port was left, lately.
 * Programs write; the agent tells who has the ports. */
struct snat_full_key {
	struct addr nat;         /* the node's address */
	struct addr dst;
	__be16 dport;
	__u8 proto;
	__u8 pad[5];
};

struct snat_full {
	__u64 packets;           /* dropped for it */
	__u32 last;              /* ticks (low half) */
	__u32 pad;
};

struct {
	__uint(type, BPF_MAP_TYPE_LRU_HASH);
	__uint(max_entries, 1024);
	__type(key, struct snat_full_key);
	__type(value, struct snat_full);
} lash_snat_full SEC(".maps");

/* --- lash_ipmasq: destinations outside of the cluster that are not masqueraded either, by longest
 * prefix. Agent writes; slow path reads. */
struct {
	__uint(type, BPF_MAP_TYPE_LPM_TRIE);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__uint(max_entries, 16384);
	__type(key, struct ipcache_key);
	__type(value, __u32);
} lash_ipmasq SEC(".maps");

/* --- lash_frags: ports of a fragmented datagram, learned from its first
 * fragment. Slow path only; old rows are evicted. */
struct frag_key {
	struct addr src;
	struct addr dst;
	__u32 id;
	__u8 proto;
	__u8 pad[3];
};

struct frag_ports {
	__be16 sport;
	__be16 dport;
};

struct {
	__uint(type, BPF_MAP_TYPE_LRU_HASH);
	__uint(max_entries, 8192);
	__type(key, struct frag_key);
	__type(value, struct frag_ports);
} lash_frags SEC(".maps");

/* --- lash_services: frontends. An address and port that is translated to a backend of
 * a service port; all frontends of a service port share its number and with it the list
 * of backends. Two keys stand for more than themselves: the unspecified address is every
 * address of a node (NodePort), and a row with port and protocol 0 says that the address
 * is a service's: it answers ping, and what nobody serves there is refused.
 * Agent writes, after the backends; socket programs and slow path read. */
struct service_key {
	struct addr addr;
	__be16 port;
	__u8 proto;
	__u8 pad[5];
};

enum frontend_flags {
	FRONTEND_OUTSIDE   = 1,  /* for packets from outside too: NodePort, LoadBalancer, external address, HostPort */
	FRONTEND_LOCAL_OUT = 2,  /* those go to backends of this node only (externalTrafficPolicy) */
	FRONTEND_LOCAL_IN  = 4,  /* connections from inside, too (internalTrafficPolicy, HostPort) */
	FRONTEND_RANGES    = 8,  /* from outside only for sources in lash_source_ranges */
	FRONTEND_MAGLEV    = 16, /* from outside the backend is chosen by lash_maglev */
	FRONTEND_DSR       = 32, /* backends of other nodes answer clients outside directly */
	FRONTEND_ADDRESS   = 64, /* the row of an address */
	FRONTEND_NODE      = 128, /* the address is a node's: there is no row of it */
	FRONTEND_DENY      = 256, /* with FRONTEND_RANGES: those sources are kept out, all others served */
	FRONTEND_TYPE_SHIFT = 12, /* the bits from here on number the kind of address, for people: no program looks at them */
};

struct service {
	__u32 id;
	__u32 count;             /* backends of the cluster; 0: connections are refused */
	__u32 first;             /* slot of the first of them, from 1 */
	__u32 local;             /* backends of this node: slots 1 to local */
	__u32 affinity;          /* seconds for which a client keeps its backend; 0: none */
	__u32 flags;             /* enum frontend_flags */
};

/* --- lash_backends: of each service port in slots from 1. Backends of this node come
 * first, those of them that serve the cluster last among them, so that both kinds are
 * ranges. Agent writes; socket programs and slow path read. */
struct backend_key {
	__u32 service;
	__u32 slot;
};

enum backend_flags {
	BACKEND_HOST = 1,        /* its address is this node's own */
};

struct backend {
	struct addr addr;
	__be16 port;
	__u8 proto;
	__u8 flags;              /* enum backend_flags */
	__u32 pad;
};

struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__uint(max_entries, 65536);
	__type(key, struct service_key);
	__type(value, struct service);
} lash_services SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__uint(max_entries, 262144);
	__type(key, struct backend_key);
	__type(value, struct backend);
} lash_backends SEC(".maps");

/* --- lash_members: every endpoint of a service port, those included that get no new
 * connections. What is remembered of a backend that is no member is forgotten.
 * Agent writes; socket programs and slow path read. */
struct member_key {
	__u32 service;
	struct addr addr;
	__be16 port;
	__u8 pad[2];
} __attribute__((packed, aligned(4)));

enum member_state {
	MEMBER_KEEPS  = 0,       /* existing connections only: terminating or not ready */
	MEMBER_ACTIVE = 1,
};

struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__uint(max_entries, 262144);
	__type(key, struct member_key);
	__type(value, __u32);
} lash_members SEC(".maps");

/* --- lash_affinity: the backend a client of a service with sessionAffinity has.
 * Socket programs and slow path write and read. */
struct affinity_key {
	struct addr client;      /* its address; at the socket its network namespace's cookie */
	__u32 service;
	__u32 pad;
};

struct affinity {
	struct addr addr;        /* backend */
	__be16 port;
	__u16 pad;
	__u32 used;              /* ticks (low half) of the last connection */
};

struct {
	__uint(type, BPF_MAP_TYPE_LRU_HASH);
	__uint(max_entries, 65536);
	__type(key, struct affinity_key);
	__type(value, struct affinity);
} lash_affinity SEC(".maps");

/* --- lash_source_ranges: sources that may, or with FRONTEND_DENY may not, reach a service from
 * outside. Agent writes; slow path reads. */
struct source_range_key {
	__u32 prefixlen;         /* 32 bits of service, then those of addr */
	__u32 service;
	struct addr addr;
} __attribute__((packed, aligned(4)));

struct {
	__uint(type, BPF_MAP_TYPE_LPM_TRIE);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__uint(max_entries, 65536);
	__type(key, struct source_range_key);
	__type(value, __u32);
} lash_source_ranges SEC(".maps");

/* --- lash_maglev: a service port's table of slots, looked up by a hash of the client's
 * end of the connection, so that every node chooses the same backend and few choices
 * move when backends change. Behind the slots stands a sum by which the agent knows
 * whether the table is that of the backends there are. Agent writes whole tables; slow
 * path reads. */
struct maglev_table {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(map_flags, BPF_F_INNER_MAP | BPF_F_MMAPABLE); /* of cfg_maglev_size + 1, written at once */
	__uint(max_entries, 16382);
	__type(key, __u32);
	__type(value, __u32);
};

struct {
	__uint(type, BPF_MAP_TYPE_HASH_OF_MAPS);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__uint(max_entries, 65536);
	__type(key, __u32);
	__array(values, struct maglev_table);
} lash_maglev SEC(".maps");

/* --- lash_ports: who owns a port number on this node, any protocol and address: packets
 * of the node's own connections are told apart by it without searching lash_services.
 * Agent writes before the rows that it announces; from_netdev, to_netdev and bind read. */
enum port_use {
	PORT_FRONTEND = 1,       /* of a frontend that is reached from outside */
	PORT_BACKEND  = 2,       /* of a backend that is this node's own (host network) */
	PORT_NODE     = 4,       /* of a frontend on the node's own addresses: no socket may bind it */
};

struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, 65536);
	__type(key, __u32);
	__type(value, __u8);
} lash_ports SEC(".maps");

/* --- lash_sock_rev: which frontend a socket asked for, by the backend it got.
 * sock programs write and read. */
struct sock_rev_key {
	__u64 cookie;
	struct addr addr;        /* backend */
	__be16 port;
	__u8 pad[6];
};

struct sock_rev {
	struct addr addr;        /* frontend */
	__be16 port;
	__u16 pad;
	__u32 service;
};

struct {
	__uint(type, BPF_MAP_TYPE_LRU_HASH);
	__uint(max_entries, 65536);
	__type(key, struct sock_rev_key);
	__type(value, struct sock_rev);
} lash_sock_rev SEC(".maps");

/* --- lash_sock_pin: the backend that datagrams of an unconnected socket to a frontend go
 * to, so that they all reach the same. sock programs write and read. */
struct sock_pin_key {
	__u64 cookie;
	struct addr addr;        /* frontend */
	__be16 port;
	__u8 pad[6];
};

struct sock_pin {
	struct addr addr;        /* backend */
	__be16 port;
	__u16 pad;
	__u32 service;
};

struct {
	__uint(type, BPF_MAP_TYPE_LRU_HASH);
	__uint(max_entries, 65536);
	__type(key, struct sock_pin_key);
	__type(value, struct sock_pin);
} lash_sock_pin SEC(".maps");

/* --- Sockets of one pod that are connected with each other exchange data without packets
 * (sockmap.c), in the network namespaces that asked for it. lash_local_netns: those, by cookie;
 * the agent writes. lash_local_pairs: connections of which an end was seen, under the tuple of
 * lash_conn; programs write, old rows are evicted: then the connection goes on by packets.
 * lash_local_socks: the ends themselves, which leave it when they are closed. */
struct pair_key {
	struct conn_key tuple;   /* pad[0] of a key of lash_local_socks: 1 for the hi side's socket */
	__u64 netns;
};

enum pair_state {
	PAIR_SEEN    = 1,        /* the end is established, with these sequence numbers */
	PAIR_LOCAL   = 2,        /* what it sends goes to the other end's socket */
	PAIR_PACKETS = 4,        /* what it sends goes by packets, for good: order would be lost */
};

struct pair_end {
	__u32 snd_nxt;           /* when it was established */
	__u32 rcv_nxt;
	__u32 unanswered;        /* bytes since the other end, having read all, sent something */
	__u32 state;             /* enum pair_state */
};

struct pair {
	struct pair_end lo, hi;
};

struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__uint(max_entries, 4096);
	__type(key, __u64);
	__type(value, __u32);
} lash_local_netns SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_LRU_HASH);
	__uint(max_entries, 16384);
	__type(key, struct pair_key);
	__type(value, struct pair);
} lash_local_pairs SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_SOCKHASH);
	__uint(max_entries, 32768);
	__type(key, struct pair_key);
	__type(value, __u64);
} lash_local_socks SEC(".maps");

/* --- lash_prefilter: sources whose packets devices drop before the kernel sees them
 * (xdp.c), by longest prefix. It is its own record: written for a person, read by
 * xdp_entry, there until it is taken away. */
struct {
	__uint(type, BPF_MAP_TYPE_LPM_TRIE);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__uint(max_entries, 16384);
	__type(key, struct ipcache_key);
	__type(value, __u32);
} lash_prefilter SEC(".maps");

/* --- lash_xdp_devices: devices that take frames from xdp_entry of another device, by
 * ifindex; with XDP_BACK, those that take back their own this way and not by XDP_TX.
 * lash_xdp_cpus: CPUs over which it spreads what it passes to the kernel, with the length of
 * their queues. Agent writes. */
enum xdp_way {
	XDP_BACK = 0x40000000,
};

struct {
	__uint(type, BPF_MAP_TYPE_DEVMAP_HASH);
	__uint(max_entries, 256);
	__type(key, __u32);
	__type(value, __u32);
} lash_xdp_devices SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_CPUMAP);
	__uint(max_entries, 1);  /* of possible CPUs */
	__type(key, __u32);
	__type(value, __u32);
} lash_xdp_cpus SEC(".maps");

/* --- lash_drops: every drop, by reason, direction, line and file. */
struct drop_key {
	__u8 reason;             /* enum drop_reason */
	__u8 dir;                /* enum hook */
	__u16 line;
	__u8 file;               /* enum file_id */
	__u8 pad[3];
};

struct count {
	__u64 packets;
	__u64 bytes;
};

struct {
	__uint(type, BPF_MAP_TYPE_PERCPU_HASH);
	__uint(max_entries, 1024);
	__type(key, struct drop_key);
	__type(value, struct count);
} lash_drops SEC(".maps");

/* --- lash_counts: what each hook forwarded, and how often and why it took the
 * slow path. Row = hook * COUNT_ROWS + enum slow_reason (0: the fast path). */
enum hook {
	HOOK_POD,                /* from_container */
	HOOK_NETDEV,             /* from_netdev */
	HOOK_HOST,               /* from_host */
	HOOK_NETDEV_OUT,         /* to_netdev */
	HOOK_SOCK,
	HOOK_OVERLAY,            /* from_overlay */
	HOOK_LOCAL,              /* messages between sockets of a pod */
	HOOK_XDP,                /* xdp_entry: only what it sends on or drops */
	HOOKS,
};

enum slow_reason {
	SLOW_NOT,                /* fast path */
	SLOW_NEW,                /* no record yet */
	SLOW_UNDECIDED,          /* this direction has no decision yet */
	SLOW_EPOCH,              /* something changed since */
	SLOW_DEADLINE,           /* the route is due for another look */
	SLOW_ELSEWHERE,          /* arrived at another device than decided */
	SLOW_REOPENED,           /* SYN on a closed connection */
	SLOW_FRAGMENT,
	SLOW_ICMP_ERROR,
	SLOW_EXTENSION,          /* IPv6 extension headers, IPv4 options, or Geneve's of DSR */
	SLOW_TTL,                /* handed to the stack, which answers time exceeded */
	SLOW_MTU,                /* handed to the stack, which fragments or answers */
	SLOW_UNROUTED,           /* no route: handed to the stack, which answers */
	SLOW_NEIGHBOUR,          /* sent by way of the kernel's neighbour table */
	SLOW_MASQUERADE,         /* a reply to a masqueraded connection */
	SLOW_REPORT,             /* followed its decision, with an event */
	SLOW_REFUSED,            /* a service has no backend, or its address no such port: answered with a refusal */
	SLOW_ECHO,               /* ping of a service's address: answered */
	SLOW_BULK,               /* of HOOK_LOCAL: a connection that carries much at once goes on by packets */
	COUNT_ROWS,
};

struct {
	__uint(type, BPF_MAP_TYPE_PERCPU_ARRAY);
	__uint(max_entries, HOOKS * COUNT_ROWS);
	__type(key, __u32);
	__type(value, struct count);
} lash_counts SEC(".maps");

/* --- lash_events: what is told about packets (lib/message.h). Programs write while
 * lash_runtime says that somebody listens, the agent reads. Its size is the agent's choice.
 * lash_events_lost: events a CPU had no room for, since the maps were made. */
struct {
	__uint(type, BPF_MAP_TYPE_RINGBUF);
	__uint(max_entries, 1 << 19);
} lash_events SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_PERCPU_ARRAY);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, __u64);
} lash_events_lost SEC(".maps");

/* --- lash_scratch: memory a CPU for what is too big for the stack. */
struct scratch {
	struct conn conn;
	struct conn_key key;     /* the packet's */
	struct conn_key nat_key; /* the translated one */
	struct conn_key lock;    /* its lock */
	struct addr nat;         /* the address that a connection is given */
	struct addr told;        /* the frontend that another node tells with the packet */
	struct snat_full_key full_key;
	struct snat_full full;
	__u8 fib[64];            /* struct bpf_fib_lookup */
	__u8 pkt[80];            /* struct pkt */
	__u8 plan[176];          /* struct plan */
	__u8 tuple[40];          /* struct bpf_sock_tuple */
	__u8 inner[48];          /* struct inner */
	struct service_key frontend;
	struct affinity_key client;
	struct affinity affinity;
	struct member_key member;
	struct source_range_key range;
	struct ipcache_key prefix;
	__u32 tell;              /* enum trace_reason */
	__u32 why;               /* enum slow_reason, of the packet in pkt */
	__u32 nat_own;           /* nat is the packet's own address */
	__be16 told_port;        /* of told */
	__u16 pad;
	/* Of an event: both ends, and where the tunnel leads (the last four bytes). */
	__u32 src_identity, dst_identity;
	__u16 src_id, dst_id;
	__be32 node;
};

struct {
	__uint(type, BPF_MAP_TYPE_PERCPU_ARRAY);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, struct scratch);
} lash_scratch SEC(".maps");

#endif
