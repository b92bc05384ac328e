// SPDX-License-Identifier: Apache-2.0

package health

import (
	"context"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"net/netip"
	"os"
	"strings"
	"testing"
	"time"

	"github.com/lash-net/lash/internal/testutil"
)

// inside runs f in a namespace in which there are loopback addresses and a device to nowhere.
func inside(t *testing.T, f func(ns *os.File)) {
	t.Helper()
	ns := testutil.Netns(t)
	testutil.In(t, ns, "sh", "-ec", `ip link set lo up
		ip addr add 10.9.9.9/32 dev lo; ip addr add fd09::9/128 dev lo nodad
		ip link add v type veth peer name w; ip link set v up; ip link set w up
		ip addr add 10.9.8.1/24 dev v; ip addr add fd08::1/64 dev v nodad`)
	testutil.Inside(t, ns, func() { f(ns) })
}

func TestPingAndHello(t *testing.T) {
	inside(t, func(*os.File) {
		r := NewResponder(4240, slog.New(slog.DiscardHandler))
		defer r.Close()
		addrs := []netip.Addr{netip.MustParseAddr("10.9.9.9"), netip.MustParseAddr("fd09::9")}
		if err := r.Listen(addrs...); err != nil {
			t.Fatal(err)
		}
		for _, a := range addrs {
			if rtt, err := Ping(t.Context(), a); err != nil || rtt <= 0 || rtt > pingTimeout {
				t.Errorf("ping %s: %v, %v", a, rtt, err)
			}
			if rtt, err := Hello(t.Context(), netip.AddrPortFrom(a, 4240)); err != nil || rtt <= 0 {
				t.Errorf("hello %s: %v, %v", a, rtt, err)
			}
		}
		// Where it does not listen it does not answer, but the kernel does.
		if err := r.Listen(addrs[1]); err != nil {
			t.Fatal(err)
		}
		_, err := Hello(t.Context(), netip.AddrPortFrom(addrs[0], 4240))
		if want := `Get "http://10.9.9.9:4240/hello": dial tcp 10.9.9.9:4240: connect: connection refused`; fmt.Sprint(err) != want {
			t.Errorf("hello: %v, want %s", err, want)
		}
		if _, err := Ping(t.Context(), addrs[0]); err != nil {
			t.Error(err)
		}
		if err := r.Listen(addrs...); err != nil {
			t.Fatal(err)
		}
		if _, err := Hello(t.Context(), netip.AddrPortFrom(addrs[0], 4240)); err != nil {
			t.Error(err)
		}
	})
}

func TestProbesThatNobodyAnswers(t *testing.T) {
	inside(t, func(*os.File) {
		silent, err := net.Listen("tcp", "10.9.9.9:4241")
		if err != nil {
			t.Fatal(err)
		}
		defer silent.Close()
		broken, err := net.Listen("tcp", "[fd09::9]:4242")
		if err != nil {
			t.Fatal(err)
		}
		go http.Serve(broken, http.NotFoundHandler())
		defer broken.Close()

		for name, tc := range map[string]struct {
			ask  func(context.Context) (time.Duration, error)
			want string
		}{
			"ping nobody":      {func(ctx context.Context) (time.Duration, error) { return Ping(ctx, netip.MustParseAddr("10.9.8.2")) }, "Connection timed out"},
			"ping nobody by 6": {func(ctx context.Context) (time.Duration, error) { return Ping(ctx, netip.MustParseAddr("fd08::2")) }, "Connection timed out"},
			"ping nowhere":     {func(ctx context.Context) (time.Duration, error) { return Ping(ctx, netip.MustParseAddr("10.1.1.1")) }, "network is unreachable"},
			"no answer": {func(ctx context.Context) (time.Duration, error) {
				return Hello(ctx, netip.MustParseAddrPort("10.9.9.9:4241"))
			}, "Connection timed out"},
			"another server": {func(ctx context.Context) (time.Duration, error) {
				return Hello(ctx, netip.MustParseAddrPort("[fd09::9]:4242"))
			}, `Get "http://[fd09::9]:4242/hello": answered 404 Not Found`},
		} {
			ctx, cancel := context.WithTimeout(t.Context(), 200*time.Millisecond)
			if rtt, err := tc.ask(ctx); err == nil || rtt != 0 || !strings.Contains(err.Error(), tc.want) {
				t.Errorf("%s: %v, %v; want %s", name, rtt, err, tc.want)
			}
			cancel()
		}
	})
}

func TestPingWaitsForOneAnswerOfSeveral(t *testing.T) {
	inside(t, func(ns *os.File) {
		const addr = "10.9.7.7" // routed to nowhere until, after the first attempt, it is an address of the node
		testutil.In(t, ns, "ip", "route", "add", addr, "dev", "v")
		arrived := make(chan struct{})
		time.AfterFunc(pingTimeout/2, func() {
			defer close(arrived)
			testutil.In(t, ns, "ip", "addr", "add", addr+"/32", "dev", "lo")
		})
		if rtt, err := Ping(t.Context(), netip.MustParseAddr(addr)); err != nil || rtt > pingTimeout {
			t.Errorf("%v, %v", rtt, err)
		}
		<-arrived
	})
}

func TestResponderAnswersHelloOnly(t *testing.T) {
	r := NewResponder(0, slog.New(slog.DiscardHandler))
	if err := r.Listen(netip.MustParseAddr("127.0.0.1")); err != nil {
		t.Fatal(err)
	}
	at := "http://" + r.listeners[netip.MustParseAddr("127.0.0.1")].Addr().String()
	for path, want := range map[string]int{"/hello": 200, "/": 404, "/healthz": 404} {
		resp, err := http.Get(at + path)
		if err != nil {
			t.Fatal(err)
		}
		body, err := io.ReadAll(resp.Body)
		resp.Body.Close()
		if err != nil || resp.StatusCode != want || want == 200 && len(body) > 0 {
			t.Errorf("%s: %s %q %v", path, resp.Status, body, err)
		}
	}
	// One address that cannot be listened on does not keep it from the others.
	if err := r.Listen(netip.MustParseAddr("192.0.2.1"), netip.MustParseAddr("127.0.0.2")); err == nil || len(r.listeners) != 1 {
		t.Errorf("%v, %d listeners", err, len(r.listeners))
	}
	if err := r.Close(); err != nil {
		t.Error(err)
	}
	if err := r.Listen(netip.MustParseAddr("127.0.0.1")); err == nil {
		t.Error("it listens after it was closed")
	}
}

// As after a restart: the prober knows the health endpoint's address before the endpoint is there again.
func TestPingWaitsForARoute(t *testing.T) {
	inside(t, func(ns *os.File) {
		arrived := make(chan struct{})
		time.AfterFunc(pingTimeout/2, func() {
			defer close(arrived)
			testutil.In(t, ns, "ip", "addr", "add", "fd07::7/128", "dev", "lo", "nodad")
		})
		if rtt, err := Ping(t.Context(), netip.MustParseAddr("fd07::7")); err != nil || rtt > pingTimeout {
			t.Errorf("%v, %v", rtt, err)
		}
		<-arrived
	})
}
