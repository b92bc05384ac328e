// SPDX-License-Identifier: Apache-2.0

// Command toolbox is the sandbox's test server and probe: one static binary of the standard library.
//
//	toolbox serve [-http :8080] [-udp :8081] [-tcp :8082] [-drain 0]   answer until killed; with -drain, that long after SIGTERM
//	toolbox pause                                           do nothing until killed
//	toolbox probe [-interval 1ms] [-for 10s] [-size 0] [-who] [-unconnected] NETWORK ADDR   send numbered messages until the time is over or SIGTERM, report what is lost
//	toolbox load [-rate 2000] [-for 10s] [-new 25] URL...   send HTTP requests at that rate, report what fails
//	toolbox ask NETWORK ADDR MESSAGE                        print what one message is answered with
//
// NETWORK is udp, udp4, udp6, tcp, tcp4 or tcp6; of a probe also icmp4 or icmp6, ADDR being without a port. HTTP: /hostname, /clientip (ADDR:PORT as seen),
// /echo?msg=, /bytes?n= (n bytes), /healthz. UDP and TCP: the messages
// "hostname" and "clientip" are answered with just that, "who N" with N and the name, over UDP also with how many datagrams had come before
// this one that its socket had no room for; over TCP "resent" with how many segments the server sent again and how many of them
// needlessly; everything else is echoed.
package main

import (
	"context"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"net"
	"net/http"
	"os"
	"os/signal"
	"strings"
	"sync/atomic"
	"syscall"
	"time"
)

func main() {
	cmd, args := "help", []string(nil)
	if len(os.Args) > 1 {
		cmd, args = os.Args[1], os.Args[2:]
	}
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGTERM, syscall.SIGINT)
	defer stop()
	var err error
	switch cmd {
	case "serve":
		err = serve(ctx, args)
	case "pause":
		<-ctx.Done()
	case "probe":
		err = probe(ctx, args)
	case "load":
		err = load(ctx, args)
	case "ask":
		err = ask(ctx, args)
	default:
		err = errors.New("usage: toolbox serve|pause|probe|load|ask [FLAGS]")
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, "toolbox:", err)
		os.Exit(1)
	}
}

func serve(ctx context.Context, args []string) error {
	fs := flag.NewFlagSet("serve", flag.ExitOnError)
	httpAddr := fs.String("http", ":8080", "HTTP `address`; empty for none")
	udpAddr := fs.String("udp", ":8081", "UDP echo `address`; empty for none")
	tcpAddr := fs.String("tcp", ":8082", "TCP echo `address`; empty for none")
	drain := fs.Duration("drain", 0, "how long to go on after SIGTERM, not ready, closing each HTTP connection with its next answer; 0: end at once")
	_ = fs.Parse(args)
	host, err := os.Hostname()
	if err != nil {
		return err
	}
	fail := make(chan error, 3)
	var leaving atomic.Bool
	web := &http.Server{Handler: announce(&leaving, handler(host))}
	if *httpAddr != "" {
		l, err := net.Listen("tcp", *httpAddr)
		if err != nil {
			return err
		}
		fmt.Printf("serving HTTP on %s\n", l.Addr())
		go func() { fail <- web.Serve(l) }()
	}
	if *udpAddr != "" {
		// one socket a family: an answer from a wildcard dual-stack socket is fine too, but
		// separate ones keep IPv4 addresses unmapped in what is printed
		for _, network := range []string{"udp4", "udp6"} {
			c, err := listenUDP(network, *udpAddr)
			if err != nil {
				if network == "udp6" {
					continue // a kernel or pod without IPv6
				}
				return err
			}
			fmt.Printf("serving UDP on %s (%s)\n", c.LocalAddr(), network)
			go func() { fail <- udpEcho(c, host) }()
		}
	}
	if *tcpAddr != "" {
		l, err := net.Listen("tcp", *tcpAddr)
		if err != nil {
			return err
		}
		fmt.Printf("serving TCP on %s\n", l.Addr())
		go func() { fail <- tcpEcho(l, host) }()
	}
	select {
	case <-ctx.Done():
	case err := <-fail:
		return err
	}
	if *drain == 0 {
		return nil
	}
	leaving.Store(true)
	select {
	case <-time.After(*drain):
	case err := <-fail:
		return err
	}
	last, cancel := context.WithTimeout(context.Background(), time.Second)
	defer cancel()
	return web.Shutdown(last) // requests that are under way are answered
}

// probe sends a numbered message every interval over one socket, and counts the answers. With tcp
// nothing can be lost while the connection lives: what was sent again and the longest gap are what tells.
func probe(ctx context.Context, args []string) error {
	fs := flag.NewFlagSet("probe", flag.ExitOnError)
	interval := fs.Duration("interval", time.Millisecond, "time between messages")
	total := fs.Duration("for", 10*time.Second, "how long to send")
	size := fs.Int("size", 0, "bytes of a message, if more than its number has")
	who := fs.Bool("who", false, "ask who answers")
	unconnected := fs.Bool("unconnected", false, "UDP: name the peer with each datagram, do not connect the socket")
	_ = fs.Parse(args)
	if fs.NArg() != 2 {
		return errors.New("usage: toolbox probe [-interval 1ms] [-for 10s] [-size 0] [-who] [-unconnected] udp|tcp HOST:PORT, or icmp4|icmp6 HOST")
	}
	dial := dial
	if *unconnected {
		dial = unconnectedTo
	}
	c, err := dial(ctx, fs.Arg(0), fs.Arg(1))
	if err != nil {
		return err
	}
	defer c.Close()
	r := run(ctx, c, message{size: *size, who: *who}, *interval, *total)
	out, err := json.Marshal(r)
	if err != nil {
		return err
	}
	fmt.Println(string(out))
	if r.Error != "" || r.Lost != 0 {
		os.Exit(2)
	}
	return nil
}

// load sends HTTP requests at a fixed rate, whether or not earlier ones are answered, and counts what fails. Nothing is
// tried a second time, also where a client would be allowed to: each failure is one that an application may see.
func load(ctx context.Context, args []string) error {
	fs := flag.NewFlagSet("load", flag.ExitOnError)
	rate := fs.Int("rate", 2000, "requests a second, of all URLs together")
	total := fs.Duration("for", 10*time.Second, "how long to send")
	fresh := fs.Int("new", 25, "percent of the requests that have a connection of their own")
	keep := fs.Int("keep", 32, "connections kept alive for the others, of each URL")
	timeout := fs.Duration("timeout", 5*time.Second, "of a request, connecting included")
	_ = fs.Parse(args)
	if fs.NArg() == 0 || *rate < 1 || *fresh < 0 || *fresh > 100 || *keep < 1 {
		return errors.New("usage: toolbox load [-rate 2000] [-for 10s] [-new 25] [-keep 32] [-timeout 5s] URL...")
	}
	g := &generator{fresh: *fresh, keep: *keep, timeout: *timeout, result: LoadResult{Failures: map[string]int64{}, Servers: map[string]int64{}}}
	for _, s := range fs.Args() {
		t, err := newTarget(s)
		if err != nil {
			return err
		}
		g.targets = append(g.targets, t)
	}
	out, err := json.Marshal(g.run(ctx, *rate, *total))
	if err != nil {
		return err
	}
	fmt.Println(string(out))
	return nil
}

// ask sends one message over an unconnected UDP socket or a TCP connection.
func ask(ctx context.Context, args []string) error {
	if len(args) != 3 {
		return errors.New("usage: toolbox ask NETWORK HOST:PORT MESSAGE")
	}
	deadline := time.Now().Add(3 * time.Second)
	buf := make([]byte, 65536)
	if strings.HasPrefix(args[0], "udp") {
		to, err := net.ResolveUDPAddr(args[0], args[1])
		if err != nil {
			return err
		}
		c, err := net.ListenUDP(args[0], nil)
		if err != nil {
			return err
		}
		defer c.Close()
		_ = c.SetDeadline(deadline)
		if _, err := c.WriteToUDP([]byte(args[2]), to); err != nil {
			return err
		}
		n, from, err := c.ReadFromUDPAddrPort(buf)
		if err != nil {
			return err
		}
		if want := to.AddrPort(); from.Addr().Unmap() != want.Addr().Unmap() || from.Port() != want.Port() {
			return fmt.Errorf("asked %s, %s answered", want, from)
		}
		fmt.Println(string(buf[:n]))
		return nil
	}
	c, err := (&net.Dialer{Deadline: deadline}).DialContext(ctx, args[0], args[1])
	if err != nil {
		return err
	}
	defer c.Close()
	_ = c.SetDeadline(deadline)
	if _, err := fmt.Fprintln(c, args[2]); err != nil {
		return err
	}
	n, err := c.Read(buf)
	if err != nil {
		return err
	}
	fmt.Println(strings.TrimSpace(string(buf[:n])))
	return nil
}
