// SPDX-License-Identifier: Apache-2.0

package health

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"net"
	"net/http"
	"net/netip"
	"os"
	"time"

	"golang.org/x/net/icmp"
	"golang.org/x/net/ipv4"
	"golang.org/x/net/ipv6"
)

// Bounds of one probe. An echo request is repeated, since one may be lost without that meaning anything.
const (
	pingAttempts = 3
	pingTimeout  = time.Second // of one attempt
	helloTimeout = 3 * time.Second
)

// errNoReply is spelled as the field's users know it.
var errNoReply = errors.New("Connection timed out")

// family is what differs between the two ICMPs.
type family struct {
	network, any   string
	proto          int // IANA
	request, reply icmp.Type
}

var (
	icmp4 = family{"ip4:icmp", "0.0.0.0", 1, ipv4.ICMPTypeEcho, ipv4.ICMPTypeEchoReply}
	icmp6 = family{"ip6:ipv6-icmp", "::", 58, ipv6.ICMPTypeEchoRequest, ipv6.ICMPTypeEchoReply}
)

// Ping sends echo requests to addr until one is answered, and returns how long the answer took.
func Ping(ctx context.Context, addr netip.Addr) (time.Duration, error) {
	f := icmp4
	if addr.Is6() {
		f = icmp6
	}
	conn, err := icmp.ListenPacket(f.network, f.any)
	if err != nil {
		return 0, fmt.Errorf("socket for ICMP: %w", err)
	}
	defer conn.Close()
	stop := context.AfterFunc(ctx, func() { conn.Close() })
	defer stop()

	id := rand.N(1 << 16)
	var sent [pingAttempts]time.Time
	problem := errNoReply
	for seq := range sent {
		request := icmp.Message{Type: f.request, Body: &icmp.Echo{ID: id, Seq: seq, Data: make([]byte, 8)}}
		b, err := request.Marshal(nil) // the kernel adds ICMPv6's checksum
		if err != nil {
			return 0, err
		}
		sent[seq] = time.Now()
		if _, err := conn.WriteTo(b, &net.IPAddr{IP: addr.AsSlice()}); err != nil && ctx.Err() == nil {
			problem = err // of an address that is just being given to the node, say: tried again like a request that is lost
		}
		if err := conn.SetReadDeadline(sent[seq].Add(pingTimeout)); err != nil {
			return 0, problem // the context has ended
		}
		// The socket sees all ICMP of the node.
		for buf := make([]byte, 1500); ; {
			n, from, err := conn.ReadFrom(buf)
			if errors.Is(err, os.ErrDeadlineExceeded) {
				break
			}
			if err != nil {
				return 0, problem
			}
			if echo, ok := echoReply(f, buf[:n]); ok && echo.ID == id && echo.Seq <= seq && sender(from) == addr {
				return time.Since(sent[echo.Seq]), nil
			}
		}
	}
	return 0, problem
}

func echoReply(f family, b []byte) (*icmp.Echo, bool) {
	m, err := icmp.ParseMessage(f.proto, b)
	if err != nil || m.Type != f.reply {
		return nil, false
	}
	echo, ok := m.Body.(*icmp.Echo)
	return echo, ok && echo.Seq >= 0
}

func sender(a net.Addr) netip.Addr {
	ip, ok := a.(*net.IPAddr)
	if !ok {
		return netip.Addr{}
	}
	addr, _ := netip.AddrFromSlice(ip.IP)
	return addr.Unmap()
}

// ended is the reason why a socket could not be used any more: the probe's context, if that has ended.
func ended(ctx context.Context, err error) error {
	if ctx.Err() != nil {
		return errNoReply
	}
	return err
}

// Hello asks a responder, on a connection of its own so that the path is tried as a new one, and returns how long that
// took in all.
func Hello(ctx context.Context, addr netip.AddrPort) (time.Duration, error) {
	ctx, cancel := context.WithTimeout(ctx, helloTimeout)
	defer cancel()
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, "http://"+addr.String()+hello, nil)
	if err != nil {
		return 0, err
	}
	req.Close = true
	start := time.Now()
	resp, err := ask(ctx, req)
	if err != nil {
		return 0, fmt.Errorf("Get %q: %w", req.URL, err)
	}
	if resp.StatusCode != http.StatusOK {
		return 0, fmt.Errorf("Get %q: answered %s", req.URL, resp.Status)
	}
	return time.Since(start), nil
}

// ask does without http.Transport, which keeps two goroutines and buffers for a connection that is used once.
func ask(ctx context.Context, req *http.Request) (*http.Response, error) {
	conn, err := new(net.Dialer).DialContext(ctx, "tcp", req.URL.Host)
	if err != nil {
		return nil, err
	}
	defer conn.Close()
	stop := context.AfterFunc(ctx, func() { conn.Close() })
	defer stop()
	if err := req.Write(conn); err != nil {
		return nil, ended(ctx, err)
	}
	resp, err := http.ReadResponse(bufio.NewReaderSize(conn, 1<<10), req)
	if err != nil {
		return nil, ended(ctx, err)
	}
	return resp, resp.Body.Close()
}
