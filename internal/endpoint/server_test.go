// SPDX-License-Identifier: Apache-2.0

package endpoint_test

import (
	"encoding/json"
	"io"
	"net"
	"os"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/lash-net/lash/internal/cni"
	"github.com/lash-net/lash/internal/testutil"
)

// send writes to the agent's socket what no plugin would, and returns the answer.
func (n *node) send(data []byte, descriptors ...int) cni.Answer {
	n.t.Helper()
	conn, err := net.DialUnix("unix", nil, &net.UnixAddr{Name: n.path("cni.sock"), Net: "unix"})
	if err != nil {
		n.t.Fatal(err)
	}
	defer conn.Close()
	var rights []byte
	if len(descriptors) > 0 {
		rights = syscall.UnixRights(descriptors...)
	}
	if _, _, err := conn.WriteMsgUnix(data, rights, nil); err != nil && len(data) > 0 {
		n.t.Fatal(err)
	}
	if err := conn.CloseWrite(); err != nil {
		n.t.Fatal(err)
	}
	out, err := io.ReadAll(conn)
	if err != nil {
		n.t.Fatal(err)
	}
	var answer cni.Answer
	if err := json.Unmarshal(out, &answer); err != nil {
		n.t.Fatalf("answer %q: %v", out, err)
	}
	return answer
}

func TestAgentSurvivesWhateverIsSent(t *testing.T) {
	n := newNode(t)
	pod := testutil.Netns(t)
	null, err := os.Open(os.DevNull)
	if err != nil {
		t.Fatal(err)
	}
	defer null.Close()
	add, err := json.Marshal(cni.Request{
		Protocol: cni.Protocol, Command: "ADD", CNIVersion: "1.1.0", Network: "lash", ContainerID: "c1", IfName: "eth0", Netns: "/x",
	})
	if err != nil {
		t.Fatal(err)
	}
	files := openFiles(t)
	fd, nullFD := int(pod.Fd()), int(null.Fd())
	for name, c := range map[string]struct {
		data        []byte
		descriptors []int
		want        string
	}{
		"nothing":               {nil, nil, "receive"},
		"garbage":               {[]byte("\x00\xff"), nil, "request"},
		"garbage with files":    {[]byte("{"), []int{fd, nullFD, fd}, "request"},
		"ADD without file":      {add, nil, "CNI_NETNS"},
		"ADD with another file": {add, []int{nullFD}, "not a network namespace"},
		"ADD of the node":       {add, []int{int(n.ns.Fd())}, "of the node"},
	} {
		answer := n.send(c.data, c.descriptors...)
		if answer.Error == nil || !strings.Contains(answer.Error.Error(), c.want) {
			t.Errorf("%s: %+v, want %q", name, answer.Error, c.want)
		}
	}
	if answer := n.send(add, fd, nullFD, nullFD); answer.Error != nil {
		t.Errorf("ADD with files to spare: %v", answer.Error)
	}
	for deadline := time.Now().Add(5 * time.Second); openFiles(t) > files; {
		if time.Now().After(deadline) {
			t.Errorf("%d open files, were %d", openFiles(t), files)
			break
		}
	}
	if res := n.call("DEL", "c1", nil); res.status != 0 {
		t.Errorf("DEL: %s", res.text())
	}
	if left := n.left(); left != "" {
		t.Errorf("left: %s", left)
	}
}

func TestSocketIsForRootOnlyAndGoneAfterTheEnd(t *testing.T) {
	n := newNode(t)
	info, err := os.Stat(n.path("cni.sock"))
	if err != nil || info.Mode().Perm() != 0o600 {
		t.Errorf("mode %v, %v", info.Mode(), err)
	}
	n.stop()
	if _, err := os.Stat(n.path("cni.sock")); !os.IsNotExist(err) {
		t.Errorf("the socket is left: %v", err)
	}
	// What a killed agent leaves does not hinder the next.
	if err := os.WriteFile(n.path("cni.sock"), nil, 0o600); err != nil {
		t.Fatal(err)
	}
	n.start()
	n.add("c1", testutil.Netns(t))
}
