//go:build ignore

/* SPDX-License-Identifier: GPL-2.0 OR BSD-2-Clause */
/* The node's cgroup: services are translated once, when a socket names its peer, so
 * that established traffic to them costs nothing a packet. Sockets that these hooks
 * do not see (SCTP, raw, ping, other network stacks), or are to leave alone (cfg_sock_host_only),
 * are served packet by packet. */
#include "lib/nat.h"

#define FILE_ID FILE_SOCK

#define AF_INET 2
#define ALLOW  1
#define REFUSE 0
#define EADDRINUSE   98
#define ECONNREFUSED 111

/* Of the addresses of a node on which an API server runs; one elsewhere has another identity. */
#define IDENTITY_KUBE_APISERVER 7

enum outcome { UNTOUCHED, TRANSLATED, REFUSED };

static __always_inline bool of_host(void *ctx)
{
	return bpf_get_netns_cookie(ctx) == cfg_host_netns;
}

static __always_inline bool unspecified(const struct addr *a)
{
	return addr_zero(a) || (addr_is4(a) && !a->w[3]);
}

/* loopback: a connection to it stays in its network namespace. To name no address is to name loopback. */
static __always_inline bool loopback(const struct addr *a)
{
	if (addr_is4(a))
		return a->b[12] == 127 || !a->w[3];
	return !a->d[0] && !a->w[2] && !(a->w[3] & ~bpf_htonl(1));
}

static __always_inline bool port_of_node(__be16 port)
{
	__u32 n = bpf_ntohs(port);
	__u8 *use = bpf_map_lookup_elem(&lash_ports, &n);

	return use && (*use & PORT_NODE);
}

enum whose { NOBODYS, THIS_NODES, ANOTHER_NODES };

/* node_of tells on which node an address serves NodePorts. Loopback is asked for only where it is the node's. */
static __always_inline enum whose node_of(const struct addr *a)
{
	struct ipcache_key key = { .prefixlen = 128, .addr = *a };
	struct ipcache_entry *e;
	struct endpoint *ep;

	if (loopback(a))
		return THIS_NODES;
	ep = bpf_map_lookup_elem(&lash_endpoints, a);
	if (ep)
		return ep->flags & ENDPOINT_NODEPORT ? THIS_NODES : NOBODYS;
	e = bpf_map_lookup_elem(&lash_ipcache, &key);
	if (e && (e->identity == IDENTITY_REMOTE_NODE || e->identity == IDENTITY_KUBE_APISERVER))
		return ANOTHER_NODES;
	return NOBODYS;
}

/* frontend finds what serves connections to an address and port: its own row, or that of every
 * node's address. What only local backends serve is left to the other node whose address was asked. */
static __always_inline struct service *frontend(void *ctx, const struct addr *a, __be16 port, __u8 proto)
{
	struct service_key key = { .addr = *a, .port = port, .proto = proto };
	struct service *svc;
	enum whose whose;

	/* A pod's loopback is its own business, even where a HostPort or NodePort has such a row. */
	if (loopback(a) && !of_host(ctx))
		return NULL;
	svc = bpf_map_lookup_elem(&lash_services, &key);
	if (svc || !port_of_node(port))
		return svc;
	whose = node_of(a);
	if (whose == NOBODYS)
		return NULL;
	if (addr_is4(a))
		key.addr.w[3] = 0;
	else
		key.addr.d[0] = key.addr.d[1] = 0;
	svc = bpf_map_lookup_elem(&lash_services, &key);
	if (svc && whose == ANOTHER_NODES && (svc->flags & FRONTEND_LOCAL_OUT))
		return NULL;
	return svc;
}

static __always_inline bool is_member(const struct sock_pin *to, bool active)
{
	struct member_key key = { .service = to->service, .addr = to->addr, .port = to->port };
	__u32 *state = bpf_map_lookup_elem(&lash_members, &key);

	return state && (!active || *state == MEMBER_ACTIVE);
}

static __always_inline bool draw(const struct service *svc, struct sock_pin *to)
{
	struct backend_key key = { .service = svc->id, .slot = 1 };
	__u32 n = svc->local;
	struct backend *b;

	if (!(svc->flags & FRONTEND_LOCAL_IN)) {
		n = svc->count;
		key.slot = svc->first;
	}
	if (!n)
		return false;
	key.slot += bpf_get_prandom_u32() % n;
	b = bpf_map_lookup_elem(&lash_backends, &key);
	if (!b)
		return false;
	to->addr = b->addr;
	to->port = b->port;
	return true;
}

/* choose fills *to with a backend for a new connection: the client's, if the service has affinity
 * and that one still takes connections, else any. A client is a network namespace. */
static __always_inline bool choose(void *ctx, const struct service *svc, struct sock_pin *to)
{
	struct affinity_key key = { .service = svc->id };
	struct affinity row = {}, *known;
	__u32 now, timeout = svc->affinity * cfg_hz;

	to->service = svc->id;
	if (!timeout)
		return draw(svc, to);
	key.client.d[0] = bpf_get_netns_cookie(ctx);
	now = ticks();
	known = bpf_map_lookup_elem(&lash_affinity, &key);
	if (known && now - known->used <= timeout) {
		to->addr = known->addr;
		to->port = known->port;
		/* The frontends of a service share its affinity, but not which backends they may use. */
		if (is_member(to, true) &&
		    (!(svc->flags & FRONTEND_LOCAL_IN) || bpf_map_lookup_elem(&lash_endpoints, &to->addr))) {
			known->used = now;
			return true;
		}
	}
	if (!draw(svc, to))
		return false;
	row.addr = to->addr;
	row.port = to->port;
	row.used = now;
	bpf_map_update_elem(&lash_affinity, &key, &row, BPF_ANY);
	return true;
}

/* remember which frontend the socket asked for, for the way back and for whoever ends the
 * connections of a backend that is gone. */
static __always_inline void remember(__u64 cookie, const struct sock_pin *to, const struct addr *a, __be16 port)
{
	struct sock_rev_key key = { .cookie = cookie, .addr = to->addr, .port = to->port };
	struct sock_rev rev = { .addr = *a, .port = port, .service = to->service };

	bpf_map_update_elem(&lash_sock_rev, &key, &rev, BPF_ANY);
}

/* remembers keeps the row of a socket that goes on sending; it may have been evicted. */
static __always_inline bool remembers(__u64 cookie, const struct sock_pin *to, const struct addr *a, __be16 port)
{
	struct sock_rev_key key = { .cookie = cookie, .addr = to->addr, .port = to->port };
	struct sock_rev *rev = bpf_map_lookup_elem(&lash_sock_rev, &key);

	return rev && rev->port == port && addr_equal(&rev->addr, a);
}

/* translate: a frontend in *a and *port becomes one of its backends. Datagrams of an unconnected
 * socket to one frontend go to one backend, as long as that is an endpoint in whatever condition. */
static __always_inline enum outcome translate(struct bpf_sock_addr *ctx, struct addr *a, __be16 *port, bool datagram)
{
	struct sock_pin_key key = { .addr = *a, .port = *port };
	struct sock_pin to = {}, *pin;
	struct service *svc;

	if (cfg_sock_host_only && !of_host(ctx))
		return UNTOUCHED;
	svc = frontend(ctx, a, *port, ctx->protocol);
	if (!svc)
		return UNTOUCHED;
	key.cookie = bpf_get_socket_cookie(ctx);
	if (datagram) {
		pin = bpf_map_lookup_elem(&lash_sock_pin, &key);
		if (pin && pin->service == svc->id) {
			to = *pin;
			if (is_member(&to, false)) {
				if (!remembers(key.cookie, &to, a, *port))
					remember(key.cookie, &to, a, *port);
				count(HOOK_SOCK, SLOW_NOT, 0);
				goto found;
			}
		}
	}
	if (!choose(ctx, svc, &to)) {
		/* The slot may have gone while it was read: the row says by now which there are. */
		svc = frontend(ctx, a, *port, ctx->protocol);
		if (!svc)
			return UNTOUCHED;
		if (!choose(ctx, svc, &to))
			return REFUSED;
	}
	remember(key.cookie, &to, a, *port);
	if (datagram)
		bpf_map_update_elem(&lash_sock_pin, &key, &to, BPF_ANY);
	count(HOOK_SOCK, SLOW_NEW, 0);
found:
	*a = to.addr;
	*port = to.port;
	return TRANSLATED;
}

static __always_inline int fail(int error)
{
	if (cfg_have_set_retval)
		bpf_set_retval(-error);
	return REFUSE; /* alone: EPERM */
}

/* refuse: at once, or by the packets' being dropped. */
static __always_inline int refuse(void)
{
	if (!cfg_lb_refuse)
		return ALLOW;
	count(HOOK_SOCK, SLOW_REFUSED, 0);
	return fail(ECONNREFUSED);
}

/* untranslate: the backend in *a and *port becomes the frontend this socket asked for. */
static __always_inline bool untranslate(struct bpf_sock_addr *ctx, struct addr *a, __be16 *port)
{
	struct sock_rev_key key = { .cookie = bpf_get_socket_cookie(ctx), .addr = *a, .port = *port };
	struct sock_rev *rev = bpf_map_lookup_elem(&lash_sock_rev, &key);

	if (!rev)
		return false;
	*a = rev->addr;
	*port = rev->port;
	return true;
}

static __always_inline void get4(struct bpf_sock_addr *ctx, struct addr *a, __be16 *port)
{
	addr_from4(a, ctx->user_ip4);
	*port = (__be16)ctx->user_port;
}

static __always_inline void get6(struct bpf_sock_addr *ctx, struct addr *a, __be16 *port)
{
	a->w[0] = ctx->user_ip6[0];
	a->w[1] = ctx->user_ip6[1];
	a->w[2] = ctx->user_ip6[2];
	a->w[3] = ctx->user_ip6[3];
	*port = (__be16)ctx->user_port;
}

static __always_inline void set4(struct bpf_sock_addr *ctx, const struct addr *a, __be16 port)
{
	ctx->user_ip4 = a->w[3];
	ctx->user_port = port;
}

static __always_inline void set6(struct bpf_sock_addr *ctx, const struct addr *a, __be16 port)
{
	ctx->user_ip6[0] = a->w[0];
	ctx->user_ip6[1] = a->w[1];
	ctx->user_ip6[2] = a->w[2];
	ctx->user_ip6[3] = a->w[3];
	ctx->user_port = port;
}

static __always_inline int forth4(struct bpf_sock_addr *ctx, bool datagram)
{
	struct addr a;
	__be16 port;

	get4(ctx, &a, &port);
	switch (translate(ctx, &a, &port, datagram)) {
	case REFUSED:
		return refuse();
	case TRANSLATED:
		set4(ctx, &a, port);
	default:
		return ALLOW;
	}
}

/* An IPv6 socket may name an IPv4 peer by its mapped address: the same row is found. */
static __always_inline int forth6(struct bpf_sock_addr *ctx, bool datagram)
{
	struct addr a;
	__be16 port;

	get6(ctx, &a, &port);
	switch (translate(ctx, &a, &port, datagram)) {
	case REFUSED:
		return refuse();
	case TRANSLATED:
		set6(ctx, &a, port);
	default:
		return ALLOW;
	}
}

static __always_inline int back4(struct bpf_sock_addr *ctx)
{
	struct addr a;
	__be16 port;

	get4(ctx, &a, &port);
	if (untranslate(ctx, &a, &port))
		set4(ctx, &a, port);
	return ALLOW;
}

static __always_inline int back6(struct bpf_sock_addr *ctx)
{
	struct addr a;
	__be16 port;

	get6(ctx, &a, &port);
	if (untranslate(ctx, &a, &port))
		set6(ctx, &a, port);
	return ALLOW;
}

/* bindable: a port that is served on an address of the node is taken there, though no socket has it. */
static __always_inline int bindable(struct bpf_sock_addr *ctx, struct addr *a, __be16 port)
{
	if (!port || !port_of_node(port) || !of_host(ctx))
		return ALLOW;
	if (frontend(ctx, a, port, ctx->protocol))
		return fail(EADDRINUSE);
	if (!addr_zero(a)) /* else IPv4's connections come to this socket, too */
		return ALLOW;
	a->w[2] = bpf_htonl(0xffff);
	return frontend(ctx, a, port, ctx->protocol) ? fail(EADDRINUSE) : ALLOW;
}

SEC("cgroup/connect4")     int connect4(struct bpf_sock_addr *ctx)     { return forth4(ctx, false); }
SEC("cgroup/connect6")     int connect6(struct bpf_sock_addr *ctx)     { return forth6(ctx, false); }
SEC("cgroup/sendmsg4")     int sendmsg4(struct bpf_sock_addr *ctx)     { return forth4(ctx, true); }
SEC("cgroup/sendmsg6")     int sendmsg6(struct bpf_sock_addr *ctx)     { return forth6(ctx, true); }
SEC("cgroup/recvmsg4")     int recvmsg4(struct bpf_sock_addr *ctx)     { return back4(ctx); }
SEC("cgroup/recvmsg6")     int recvmsg6(struct bpf_sock_addr *ctx)     { return back6(ctx); }
SEC("cgroup/getpeername4") int getpeername4(struct bpf_sock_addr *ctx) { return back4(ctx); }
SEC("cgroup/getpeername6") int getpeername6(struct bpf_sock_addr *ctx) { return back6(ctx); }

SEC("cgroup/bind4")
int bind4(struct bpf_sock_addr *ctx)
{
	struct addr a;
	__be16 port;

	get4(ctx, &a, &port);
	return bindable(ctx, &a, port);
}

SEC("cgroup/bind6")
int bind6(struct bpf_sock_addr *ctx)
{
	struct addr a;
	__be16 port;

	get6(ctx, &a, &port);
	return bindable(ctx, &a, port);
}

/* A connected socket's row goes with it: rows of the dead would push those of the living out. Most
 * sockets have none, and to look for it takes no lock. */
SEC("cgroup/sock_release")
int sock_release(struct bpf_sock *ctx)
{
	struct sock_rev_key key = { .port = ctx->dst_port };

	if (!key.port)
		return ALLOW;
	key.cookie = bpf_get_socket_cookie(ctx);
	if (ctx->family == AF_INET) {
		addr_from4(&key.addr, ctx->dst_ip4);
	} else {
		key.addr.w[0] = ctx->dst_ip6[0];
		key.addr.w[1] = ctx->dst_ip6[1];
		key.addr.w[2] = ctx->dst_ip6[2];
		key.addr.w[3] = ctx->dst_ip6[3];
	}
	if (bpf_map_lookup_elem(&lash_sock_rev, &key))
		bpf_map_delete_elem(&lash_sock_rev, &key);
	return ALLOW;
}

char LICENSE[] SEC("license") = "Dual BSD/GPL";
