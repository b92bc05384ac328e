// SPDX-License-Identifier: Apache-2.0

package main

import (
	"encoding/binary"
	"net"
	"os"
	"slices"
	"strings"
	"syscall"
	"unsafe"
)

// soRxqOvfl makes the kernel say with each datagram how many the socket has dropped before (SO_RXQ_OVFL).
const soRxqOvfl = 40

// droppedBefore is what the kernel says with a datagram: how many the socket had no room for by then. A damaged datagram
// counts for it too, so where there have been any, nothing is said.
func droppedBefore(control []byte) uint32 {
	messages, err := syscall.ParseSocketControlMessage(control)
	if err != nil {
		return 0
	}
	for _, m := range messages {
		if m.Header.Level == syscall.SOL_SOCKET && m.Header.Type == soRxqOvfl && len(m.Data) >= 4 && !damaged() {
			return binary.NativeEndian.Uint32(m.Data)
		}
	}
	return 0
}

// resent is the connection's count of segments sent again, and of those that the peer had already. 0 if c is no TCP
// connection.
func resent(c net.Conn) (total, needless int64) {
	t, ok := c.(*net.TCPConn)
	if !ok {
		return 0, 0
	}
	var info [256]byte // struct tcp_info of linux/tcp.h: tcpi_total_retrans, tcpi_dsack_dups
	sockopt(t, syscall.IPPROTO_TCP, syscall.TCP_INFO, info[:])
	return int64(binary.NativeEndian.Uint32(info[100:])), int64(binary.NativeEndian.Uint32(info[216:]))
}

// overflowed is the count of datagrams that did not fit into the socket's buffer. 0 where damaged ones may be among them.
func overflowed(c net.Conn) int64 {
	if damaged() {
		return 0
	}
	if p, ok := c.(*pinger); ok {
		c = p.Conn
	}
	if f, ok := c.(*floating); ok {
		c = f.UDPConn
	}
	const soMeminfo = 55
	var info [9 * 4]byte // SK_MEMINFO_VARS of linux/sock_diag.h; the last is SK_MEMINFO_DROPS
	if s, ok := c.(syscall.Conn); ok {
		sockopt(s, syscall.SOL_SOCKET, soMeminfo, info[:])
	}
	return int64(binary.NativeEndian.Uint32(info[32:]))
}

// damaged: datagrams with a wrong checksum have come to this network namespace, or it does not say.
func damaged() bool {
	v4, err4 := os.ReadFile("/proc/self/net/snmp")
	v6, err6 := os.ReadFile("/proc/self/net/snmp6")
	return err4 != nil || err6 != nil || countedDamage(string(v4), string(v6))
}

// countedDamage reads the kernel's tables: of IPv4 a line of names and one of values, of IPv6 a name and its value in each.
func countedDamage(v4, v6 string) bool {
	var names []string
	for line := range strings.Lines(v4) {
		fields := strings.Fields(line)
		if len(fields) == 0 || fields[0] != "Udp:" {
			continue
		}
		if names == nil {
			names = fields
			continue
		}
		if i := slices.Index(names, "InCsumErrors"); i < 0 || i >= len(fields) || fields[i] != "0" {
			return true
		}
	}
	for line := range strings.Lines(v6) {
		if fields := strings.Fields(line); len(fields) == 2 && fields[0] == "Udp6InCsumErrors" && fields[1] != "0" {
			return true
		}
	}
	return false
}

func sockopt(c syscall.Conn, level, option uintptr, value []byte) {
	raw, err := c.SyscallConn()
	if err != nil {
		return
	}
	size := uint32(len(value))
	_ = raw.Control(func(fd uintptr) {
		_, _, _ = syscall.Syscall6(syscall.SYS_GETSOCKOPT, fd, level, option, uintptr(unsafe.Pointer(&value[0])), uintptr(unsafe.Pointer(&size)), 0)
	})
}
