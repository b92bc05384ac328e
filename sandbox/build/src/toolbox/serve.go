// SPDX-License-Identifier: Apache-2.0

package main

import (
	"bufio"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"strconv"
	"strings"
	"sync/atomic"
	"syscall"
)

// announce makes h say that the server is about to end, once it is: it is not ready, and each connection ends with its
// next answer, so that no client sends a request on one that is being closed.
func announce(leaving *atomic.Bool, h http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if leaving.Load() {
			w.Header().Set("Connection", "close")
			if r.URL.Path == "/healthz" {
				http.Error(w, "about to end", http.StatusServiceUnavailable)
				return
			}
		}
		h.ServeHTTP(w, r)
	})
}

func handler(host string) http.Handler {
	mux := http.NewServeMux()
	mux.HandleFunc("/healthz", func(w http.ResponseWriter, _ *http.Request) { _, _ = io.WriteString(w, "ok") })
	mux.HandleFunc("/hostname", func(w http.ResponseWriter, _ *http.Request) { _, _ = io.WriteString(w, host) })
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

// listenUDP opens a socket that counts what it has no room for, and has as much room as it may.
func listenUDP(network, addr string) (*net.UDPConn, error) {
	at, err := net.ResolveUDPAddr(network, addr)
	if err != nil {
		return nil, err
	}
	c, err := net.ListenUDP(network, at)
	if err != nil {
		return nil, err
	}
	_ = c.SetReadBuffer(1 << 20)
	raw, err := c.SyscallConn()
	if err == nil {
		err = errors.Join(raw.Control(func(fd uintptr) { err = syscall.SetsockoptInt(int(fd), syscall.SOL_SOCKET, soRxqOvfl, 1) }), err)
	}
	return c, err
}

func udpEcho(c *net.UDPConn, host string) error {
	buf, control := make([]byte, 65536), make([]byte, 64)
	for {
		n, oob, _, from, err := c.ReadMsgUDP(buf, control)
		if err != nil {
			if errors.Is(err, syscall.ECONNREFUSED) {
				continue
			}
			return err
		}
		msg := string(buf[:n])
		out := answer(msg, host, from)
		if dropped := droppedBefore(control[:oob]); dropped > 0 && strings.HasPrefix(msg, "who ") {
			out = fmt.Sprintf("%s %d\n", strings.TrimSpace(out), dropped)
		}
		_, _ = c.WriteToUDP([]byte(out), from)
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
					if strings.TrimSpace(line) == "resent" {
						total, needless := resent(c)
						out = fmt.Sprint("resent ", total, " ", needless)
					}
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

// answer is what a datagram or line is answered with.
func answer(msg, host string, from net.Addr) string {
	switch strings.TrimSpace(msg) {
	case "hostname":
		return host
	case "clientip":
		return from.String()
	}
	if rest, ok := strings.CutPrefix(msg, "who "); ok {
		number, _, _ := strings.Cut(strings.TrimSpace(rest), " ")
		return number + " " + host + "\n"
	}
	return msg
}
