// SPDX-License-Identifier: Apache-2.0

package main

import (
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/lash-net/lash/internal/config"
)

// A mistake in the file of ip-masq-agent is told as long as it is there, and what the file said before holds.
func TestLastGoodIPMasqFileHolds(t *testing.T) {
	f := ipMasqFile{path: filepath.Join(t.TempDir(), "ip-masq-agent")}
	write := func(text string) {
		t.Helper()
		if err := os.WriteFile(f.path, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	want := func(rows int, problem string) {
		t.Helper()
		for range 2 {
			got, err := f.read()
			if len(got.NonMasquerade) != rows || (err == nil) != (problem == "") || err != nil && !strings.Contains(err.Error(), problem) {
				t.Errorf("%d rows, %v; want %d, %q", len(got.NonMasquerade), err, rows, problem)
			}
		}
	}
	write("nonMasqueradeCIDRs: [10.0.0.1/8]")
	want(13, "write 10.0.0.0/8") // the defaults, as if it were not there
	write("nonMasqueradeCIDRs: [10.0.0.0/8]")
	want(3, "")
	write("nonMasqueradeCIDRs: [10.0.0.0/8, x]")
	want(3, "nonMasqueradeCIDRs[1]")
	write("nonMasqueradeCIDRs: []\nmasqLinkLocal: true")
	want(1, "")
	if err := os.Remove(f.path); err != nil {
		t.Fatal(err)
	}
	want(13, "")
}

// Sixty thousand connections to one destination need as many ports, and none that NodePorts may have.
func TestSourcePortsKeepOutOfNodePorts(t *testing.T) {
	for _, tt := range []struct{ nodePorts, near, far config.PortRange }{
		{config.PortRange{First: 30000, Last: 32767}, config.PortRange{First: 1024, Last: 29999}, config.PortRange{First: 32768, Last: 65535}},
		{config.PortRange{First: 60000, Last: 65535}, config.PortRange{First: 1024, Last: 59999}, config.PortRange{}},
		{config.PortRange{First: 1, Last: 500}, config.PortRange{First: 1024, Last: 65535}, config.PortRange{}},
		{config.PortRange{First: 1024, Last: 9999}, config.PortRange{First: 10000, Last: 65535}, config.PortRange{}},
	} {
		near, far, err := sourcePorts(tt.nodePorts)
		if err != nil || near != tt.near || far != tt.far {
			t.Errorf("%v: %v, %v, %v", tt.nodePorts, near, far, err)
		}
	}
	if _, _, err := sourcePorts(config.PortRange{First: 1000, Last: 65535}); err == nil {
		t.Error("no ports are left, and no error")
	}
}
