// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"encoding/binary"
	"net"
	"os"
	"sync/atomic"
	"time"
)

func dial(ctx context.Context, network, addr string) (net.Conn, error) {
	d := net.Dialer{Timeout: 5 * time.Second}
	switch network {
	case "icmp4":
		c, err := d.DialContext(ctx, "ip4:icmp", addr)
		return &pinger{Conn: c, request: 8, reply: 0}, err
	case "icmp6":
		c, err := d.DialContext(ctx, "ip6:ipv6-icmp", addr)
		return &pinger{Conn: c, request: 128, reply: 129}, err
	}
	return d.DialContext(ctx, network, addr)
}

func unconnectedTo(_ context.Context, network, addr string) (net.Conn, error) {
	peer, err := net.ResolveUDPAddr(network, addr)
	if err != nil {
		return nil, err
	}
	c, err := net.ListenUDP(network, nil)
	return &floating{UDPConn: c, peer: peer}, err
}

// floating is an unconnected UDP socket that always sends to the same peer, and counts whom it hears besides.
type floating struct {
	*net.UDPConn
	peer   *net.UDPAddr
	strays atomic.Int64
	first  atomic.Pointer[time.Time] // stray
}

func (f *floating) Write(b []byte) (int, error) { return f.WriteToUDP(b, f.peer) }

func (f *floating) Read(b []byte) (int, error) {
	for {
		n, from, err := f.ReadFromUDPAddrPort(b)
		if err != nil || from.Addr().Unmap() == f.peer.AddrPort().Addr().Unmap() && int(from.Port()) == f.peer.Port {
			return n, err
		}
		now := time.Now()
		f.first.CompareAndSwap(nil, &now)
		f.strays.Add(1)
	}
}

// pinger sends what is written as echo requests and reads what the replies bring.
type pinger struct {
	net.Conn
	request, reply byte // ICMP types
	seq            uint16
}

func (p *pinger) Write(b []byte) (int, error) {
	m := append(make([]byte, 8, 8+len(b)), b...)
	m[0] = p.request
	binary.BigEndian.PutUint16(m[4:], uint16(os.Getpid()))
	binary.BigEndian.PutUint16(m[6:], p.seq)
	p.seq++
	if p.request == 8 { // the kernel computes the other family's
		binary.BigEndian.PutUint16(m[2:], checksum(m))
	}
	if _, err := p.Conn.Write(m); err != nil {
		return 0, err
	}
	return len(b), nil
}

func (p *pinger) Read(b []byte) (int, error) {
	buf := make([]byte, 65536)
	for {
		n, _, err := p.Conn.(net.PacketConn).ReadFrom(buf) // Read would leave the IPv4 header in place
		if err != nil {
			return 0, err
		}
		if n >= 8 && buf[0] == p.reply && binary.BigEndian.Uint16(buf[4:]) == uint16(os.Getpid()) {
			return copy(b, buf[8:n]), nil
		}
	}
}

// checksum is that of RFC 1071.
func checksum(b []byte) uint16 {
	var sum uint32
	for i, x := range b {
		sum += uint32(x) << (8 * (1 - i%2))
	}
	for sum>>16 != 0 {
		sum = sum>>16 + sum&0xffff
	}
	return ^uint16(sum)
}
