// SPDX-License-Identifier: Apache-2.0

// Command toolbox is the sandbox's test server and probe: one static binary of the standard library.
//
//	toolbox serve [-http :8080] [-udp :8081] [-tcp :8082]   answer until killed
//	toolbox pause                                           do nothing until killed
//	toolbox probe [-interval 1ms] [-for 10s] NETWORK ADDR   send numbered messages, report what is lost
//	toolbox ask NETWORK ADDR MESSAGE                        print what one message is answered with
//
// NETWORK is udp, udp4, udp6, tcp, tcp4 or tcp6. HTTP: /hostname, /clientip (ADDR:PORT as seen),
// /echo?msg=, /bytes?n= (n bytes), /healthz. UDP and TCP: the messages
// "hostname" and "clientip" are answered with just that, everything else is echoed.
package main

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"os/signal"
	"strconv"
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
	case "ask":
		err = ask(ctx, args)
	default:
		err = errors.New("usage: toolbox serve|pause|probe|ask [FLAGS]")
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
	_ = fs.Parse(args)
	host, err := os.Hostname()
	if err != nil {
		return err
	}
	fail := make(chan error, 3)
	if *httpAddr != "" {
		l, err := net.Listen("tcp", *httpAddr)
		if err != nil {
			return err
		}
		fmt.Printf("serving HTTP on %s\n", l.Addr())
		go func() { fail <- http.Serve(l, handler(host)) }()
	}
	if *udpAddr != "" {
		// one socket a family: an answer from a wildcard dual-stack socket is fine too, but
		// separate ones keep IPv4 addresses unmapped in what is printed
		for _, network := range []string{"udp4", "udp6"} {
			c, err := net.ListenPacket(network, *udpAddr)
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
		return nil
	case err := <-fail:
		return err
	}
}

func handler(host string) http.Handler {
	mux := http.NewServeMux()
	mux.HandleFunc("/healthz", func(w http.ResponseWriter, _ *http.Request) { _, _ = io.WriteString(w, "ok") })
	mux.HandleFunc("/hostname", func(w http.ResponseWriter, r *http.Request) {
		fmt.Printf("%s %s from %s\n", r.Method, r.URL.Path, r.RemoteAddr)
		_, _ = io.WriteString(w, host)
	})
	mux.HandleFunc("/clientip", func(w http.ResponseWriter, r *http.Request) { _, _ = io.WriteString(w, r.RemoteAddr) })
	mux.HandleFunc("/bytes", func(w http.ResponseWriter, r *http.Request) {
		n, err := strconv.ParseInt(r.FormValue("n"), 10, 64)
		if err != nil || n < 0 {
			http.Error(w, "n must be a number", http.StatusBadRequest)
			return
		}
		_, _ = io.CopyN(w, zeros{}, n)
	})
	mux.HandleFunc("/echo", func(w http.ResponseWriter, r *http.Request) { _, _ = io.WriteString(w, r.FormValue("msg")) })
	return mux
}

// zeros is an endless source.
type zeros struct{}

func (zeros) Read(p []byte) (int, error) { clear(p); return len(p), nil }

// answer is what a datagram or line is answered with.
func answer(msg, host string, from net.Addr) string {
	switch strings.TrimSpace(msg) {
	case "hostname":
		return host
	case "clientip":
		return from.String()
	}
	return msg
}

func udpEcho(c net.PacketConn, host string) error {
	buf := make([]byte, 65536)
	for {
		n, from, err := c.ReadFrom(buf)
		if err != nil {
			if errors.Is(err, syscall.ECONNREFUSED) {
				continue
			}
			return err
		}
		_, _ = c.WriteTo([]byte(answer(string(buf[:n]), host, from)), from)
	}
}

func tcpEcho(l net.Listener, host string) error {
	for {
		c, err := l.Accept()
		if err != nil {
			return err
		}
		go func() {
			defer c.Close()
			r := bufio.NewReader(c)
			for {
				line, err := r.ReadString('\n')
				if line != "" {
					out := answer(line, host, c.RemoteAddr())
					if !strings.HasSuffix(out, "\n") {
						out += "\n"
					}
					if _, err := io.WriteString(c, out); err != nil {
						return
					}
				}
				if err != nil {
					return
				}
			}
		}()
	}
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

// Result of a probe; gaps are between answers, in milliseconds.
type Result struct {
	Sent     int64   `json:"sent"`
	Received int64   `json:"received"`
	Lost     int64   `json:"lost"`
	MaxGapMS float64 `json:"maxGapMs"`
	Error    string  `json:"error,omitempty"`
}

// probe sends a numbered message every interval over one socket, and counts the answers. With tcp
// nothing can be lost while the connection lives, so the longest gap is what tells.
func probe(ctx context.Context, args []string) error {
	fs := flag.NewFlagSet("probe", flag.ExitOnError)
	interval := fs.Duration("interval", time.Millisecond, "time between messages")
	total := fs.Duration("for", 10*time.Second, "how long to send")
	_ = fs.Parse(args)
	if fs.NArg() != 2 {
		return errors.New("usage: toolbox probe [-interval 1ms] [-for 10s] udp|tcp HOST:PORT")
	}
	c, err := (&net.Dialer{Timeout: 5 * time.Second}).DialContext(ctx, fs.Arg(0), fs.Arg(1))
	if err != nil {
		return err
	}
	defer c.Close()
	r := run(ctx, c, *interval, *total)
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

func run(ctx context.Context, c net.Conn, interval, total time.Duration) Result {
	var sent, received atomic.Int64
	var maxGap time.Duration
	readErr := make(chan error, 1)
	go func() {
		last := time.Now()
		s := bufio.NewScanner(c)
		for s.Scan() {
			if _, err := strconv.ParseInt(s.Text(), 10, 64); err != nil {
				readErr <- fmt.Errorf("answer %q", s.Text())
				return
			}
			received.Add(1)
			if gap := time.Since(last); gap > maxGap {
				maxGap = gap
			}
			last = time.Now()
		}
		readErr <- s.Err()
	}()
	ctx, cancel := context.WithTimeout(ctx, total)
	defer cancel()
	tick := time.NewTicker(interval)
	defer tick.Stop()
	res := Result{}
sending:
	for {
		select {
		case <-ctx.Done():
			break sending
		case <-tick.C:
			if _, err := fmt.Fprintf(c, "%d\n", sent.Load()); err != nil {
				res.Error = err.Error()
				break sending
			}
			sent.Add(1)
		}
	}
	deadline := time.Now().Add(2 * time.Second) // answers on their way
	for received.Load() < sent.Load() && time.Now().Before(deadline) {
		time.Sleep(time.Millisecond)
	}
	_ = c.SetReadDeadline(time.Now())
	if err := <-readErr; err != nil && !errors.Is(err, os.ErrDeadlineExceeded) && res.Error == "" {
		res.Error = err.Error()
	}
	res.Sent, res.Received = sent.Load(), received.Load()
	res.Lost = res.Sent - res.Received
	res.MaxGapMS = float64(maxGap.Microseconds()) / 1000
	return res
}
