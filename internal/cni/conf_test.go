// SPDX-License-Identifier: Apache-2.0

package cni

import (
	"errors"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
)

func installation(t *testing.T) Installation {
	t.Helper()
	dir := t.TempDir()
	binary := filepath.Join(dir, "image", "lash-cni")
	write(t, binary, "#!plugin")
	return Installation{ConfDir: filepath.Join(dir, "net.d"), BinDir: filepath.Join(dir, "bin"), Binary: binary, Socket: DefaultSocket}
}

func write(t *testing.T, path, content string) {
	t.Helper()
	if err := errors.Join(os.MkdirAll(filepath.Dir(path), 0o755), os.WriteFile(path, []byte(content), 0o644)); err != nil {
		t.Fatal(err)
	}
}

// files are names and contents.
func files(t *testing.T, dir string) map[string]string {
	t.Helper()
	entries, err := os.ReadDir(dir)
	if err != nil {
		t.Fatal(err)
	}
	all := map[string]string{}
	for _, entry := range entries {
		data, err := os.ReadFile(filepath.Join(dir, entry.Name()))
		if err != nil {
			t.Fatal(err)
		}
		all[entry.Name()] = string(data)
	}
	return all
}

const wantConf = `{
  "cniVersion": "1.0.0",
  "cniVersions": [
    "0.3.1",
    "0.4.0",
    "1.0.0",
    "1.1.0"
  ],
  "name": "lash",
  "plugins": [
    {
      "type": "lash-cni"
    }
  ]
}
`

func TestConfigurationIsWrittenOnceAndRemoved(t *testing.T) {
	i := installation(t)
	write(t, filepath.Join(i.ConfDir, "10-other.conf"), "other")
	for range 2 {
		if err := i.WriteConf(); err != nil {
			t.Fatal(err)
		}
	}
	if diff := cmp.Diff(map[string]string{"05-lash.conflist": wantConf, "10-other.conf": "other"}, files(t, i.ConfDir)); diff != "" {
		t.Error(diff)
	}
	for range 2 {
		if err := i.RemoveConf(); err != nil {
			t.Fatal(err)
		}
	}
	if diff := cmp.Diff(map[string]string{"10-other.conf": "other"}, files(t, i.ConfDir)); diff != "" {
		t.Error(diff)
	}
}

func TestExclusiveRenamesOthersAndUninstallNamesThemBack(t *testing.T) {
	i := installation(t)
	i.Exclusive = true
	before := map[string]string{"00-first.conflist": "a", "10-other.conf": "b", "20.json": "c", "README": "d"}
	for name, content := range before {
		write(t, filepath.Join(i.ConfDir, name), content)
	}
	for range 2 {
		if err := i.WriteConf(); err != nil {
			t.Fatal(err)
		}
	}
	want := map[string]string{
		"00-first.conflist.lash_bak": "a", "10-other.conf.lash_bak": "b", "20.json.lash_bak": "c", "README": "d", "05-lash.conflist": wantConf,
	}
	if diff := cmp.Diff(want, files(t, i.ConfDir)); diff != "" {
		t.Error(diff)
	}
	if err := i.InstallBinary(); err != nil {
		t.Fatal(err)
	}
	if err := i.Uninstall(); err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(before, files(t, i.ConfDir)); diff != "" {
		t.Error(diff)
	}
	if left := files(t, i.BinDir); len(left) != 0 {
		t.Errorf("left %v", left)
	}
}

func TestConfigurationNamesWhatDiffersFromTheDefaults(t *testing.T) {
	i := installation(t)
	i.Socket, i.MTU, i.RouteMTU = "/run/second/cni.sock", 1400, 1350
	if err := i.WriteConf(); err != nil {
		t.Fatal(err)
	}
	got := files(t, i.ConfDir)[ConfName]
	for _, want := range []string{`"socket": "/run/second/cni.sock"`, `"mtu": 1400`, `"route-mtu": 1350`} {
		if !strings.Contains(got, want) {
			t.Errorf("%s is not in\n%s", want, got)
		}
	}
}

func TestBinaryIsReplacedWhileItRuns(t *testing.T) {
	i := installation(t)
	if err := i.InstallBinary(); err != nil {
		t.Fatal(err)
	}
	target := filepath.Join(i.BinDir, PluginName)
	before, err := os.Stat(target)
	if err != nil || before.Mode().Perm() != 0o755 {
		t.Fatalf("%v %v", before.Mode(), err)
	}
	if err := i.InstallBinary(); err != nil {
		t.Fatal(err)
	}
	if same, err := os.Stat(target); err != nil || !os.SameFile(before, same) {
		t.Errorf("an identical binary was written again (%v)", err)
	}
	write(t, i.Binary, "#!plugin of the next release")
	if err := i.InstallBinary(); err != nil {
		t.Fatal(err)
	}
	if after, err := os.Stat(target); err != nil || os.SameFile(before, after) {
		t.Errorf("the file in use was written to (%v)", err)
	}
	if got := files(t, i.BinDir); len(got) != 1 || got[PluginName] != "#!plugin of the next release" {
		t.Errorf("%v", got)
	}
}

// answers serves each connection with the next of the answers.
func answers(t *testing.T, texts ...string) (socket string) {
	t.Helper()
	socket = filepath.Join(t.TempDir(), "cni.sock")
	listener, err := net.Listen("unix", socket)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { listener.Close() })
	go func() {
		for _, text := range texts {
			conn, err := listener.Accept()
			if err != nil {
				return
			}
			buf := make([]byte, 1<<16)
			for n := 1; n > 0; {
				n, _ = conn.Read(buf)
			}
			conn.Write([]byte(text))
			conn.Close()
		}
	}()
	return socket
}

func TestAnswersOfABrokenAgentAreErrors(t *testing.T) {
	req := &Request{Protocol: Protocol, Command: "STATUS", CNIVersion: "1.1.0", Network: "lash"}
	for text, want := range map[string]string{
		"":                               "ended while it worked",
		"{":                              "line 1",
		`{"protocol":7}`:                 "protocol version 7",
		strings.Repeat(" ", maxAnswer+1): "more than",
	} {
		if _, err := call(answers(t, text), req, -1, 5*time.Second); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("answer of %d bytes: %v, want %q", len(text), err, want)
		}
	}
}

func TestSilentAgentIsGivenUp(t *testing.T) {
	socket := filepath.Join(t.TempDir(), "cni.sock")
	listener, err := net.Listen("unix", socket)
	if err != nil {
		t.Fatal(err)
	}
	defer listener.Close()
	req := &Request{Protocol: Protocol, Command: "STATUS", CNIVersion: "1.1.0", Network: "lash"}
	if _, err := call(socket, req, -1, 50*time.Millisecond); err == nil || !strings.Contains(err.Error(), "no answer") {
		t.Errorf("error %v", err)
	}
}

func TestLongRequestArrives(t *testing.T) {
	req := &Request{Protocol: Protocol, Command: "GC", CNIVersion: "1.1.0", Network: "lash"}
	req.Valid = slices.Repeat([]Attachment{{strings.Repeat("c", 64), "eth0"}}, 10000)
	if _, err := call(answers(t, `{"protocol":1}`), req, -1, 5*time.Second); err != nil {
		t.Error(err)
	}
}
