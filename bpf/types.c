//go:build ignore

/* SPDX-License-Identifier: GPL-2.0 OR BSD-2-Clause */
/* Never loaded: compiled so that the enumerations, which programs use only as
 * numbers, and the messages of lash_events have BTF for bpf/gen to read. */
#include "lib/route.h"

enum endpoint_flags *endpoint_flags;
enum conn_action *conn_action;
enum dir_flags *dir_flags;
enum conn_in *conn_in;
enum conn_flags *conn_flags;
enum conn_state *conn_state;
enum hook *hook;
enum slow_reason *slow_reason;
enum drop_reason *drop_reason;
enum file_id *file_id;
enum identity *identity;
enum ipcache_flags *ipcache_flags;
enum frontend_flags *frontend_flags;
enum backend_flags *backend_flags;
enum member_state *member_state;
enum port_use *port_use;
enum key_kind *key_kind;
enum event_switches *event_switches;
enum aggregation *aggregation;
enum report *report;
enum xdp_way *xdp_way;
enum event_type *event_type;
enum trace_point *trace_point;
enum trace_reason *trace_reason;
enum trace_flags *trace_flags;
enum capture_point *capture_point;
enum verdict_flags *verdict_flags;
enum debug_type *debug_type;

struct event_head *event_head;
struct trace_notify *trace_notify;
struct drop_notify *drop_notify;
struct capture_notify *capture_notify;
struct verdict_notify *verdict_notify;
struct debug_notify *debug_notify;
