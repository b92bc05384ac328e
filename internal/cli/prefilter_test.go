// SPDX-License-Identifier: Apache-2.0

package cli

import (
	"encoding/json"
	"io"
	"net"
	"net/http"
	"path/filepath"
	"strings"
	"testing"
)

func TestPrefilterIsShownAndChanged(t *testing.T) {
	socket, sent := filepath.Join(t.TempDir(), "s"), ""
	l, err := net.Listen("unix", socket)
	if err != nil {
		t.Fatal(err)
	}
	mux := http.NewServeMux()
	answer := func(w http.ResponseWriter) { _ = json.NewEncoder(w).Encode([]string{"192.0.2.0/24", "2001:db8::/32"}) }
	mux.HandleFunc("GET /v1/prefilter", func(w http.ResponseWriter, _ *http.Request) { answer(w) })
	mux.HandleFunc("PATCH /v1/prefilter", func(w http.ResponseWriter, r *http.Request) {
		b, _ := io.ReadAll(r.Body)
		sent = string(b)
		answer(w)
	})
	srv := &http.Server{Handler: mux}
	go srv.Serve(l)
	t.Cleanup(func() { srv.Close() })
	for _, tt := range []struct{ args, sent, out, err string }{
		{args: "list", out: "CIDR\n192.0.2.0/24\n2001:db8::/32\n"},
		{args: "list -o json", out: "[\n  \"192.0.2.0/24\",\n  \"2001:db8::/32\"\n]\n"},
		{args: "update --cidr 192.0.2.0/24,2001:db8::/32", sent: `{"add":["192.0.2.0/24","2001:db8::/32"]}`, out: "CIDR\n"},
		{args: "update --cidr 192.0.2.7", sent: `{"add":["192.0.2.7/32"]}`, out: "CIDR\n"},
		{args: "delete --cidr 2001:db8::1 --cidr 192.0.2.0/24", sent: `{"remove":["2001:db8::1/128","192.0.2.0/24"]}`, out: "CIDR\n"},
		{args: "update", err: "--cidr is missing"},
		{args: "update --cidr 192.0.2.7/24", err: "write 192.0.2.0/24, or 192.0.2.7 for the one address"},
		{args: "update --cidr example.net", err: "must be a prefix or an address"},
		{args: "update --cidr ::ffff:192.0.2.0/120", err: "write it as IPv4"},
		{args: "delete --cidr fe80::1%eth0", err: "must be a prefix or an address"},
	} {
		sent = ""
		code, out, errOut := run(t, append(strings.Fields("prefilter "+tt.args), "--socket", socket)...)
		if (code != 0) != (tt.err != "") || sent != tt.sent || !strings.HasPrefix(out, tt.out) || !strings.Contains(errOut, tt.err) {
			t.Errorf("lash prefilter %s: status %d, %q, sent %s, printed\n%s\nwant %+v", tt.args, code, errOut, sent, out, tt)
		}
	}
}
