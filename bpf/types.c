//go:build ignore

/* SPDX-License-Identifier: GPL-2.0 OR BSD-2-Clause */
/* Never loaded: compiled so that the enumerations, which programs use only as
 * numbers, have BTF for bpf/gen to read. */
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
