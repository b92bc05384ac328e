// SPDX-License-Identifier: Apache-2.0

package demo

import (
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

// Nothing of a capture remains: neither when it ended well, nor when it never began, nor when whoever wanted it is interrupted.
func TestCaptureLeavesNothingBehind(t *testing.T) {
	for _, c := range []struct {
		name, tcpdump string // what stands in for the program
		begins        bool
		want          string
	}{
		{"it captures", "echo listening >&2; exec sleep 600", true, ""},
		{"no such device", "echo no such device >&2; exit 1", false, "no such device"},
		{"it never begins", "exec sleep 600", false, "capture on eth0"},
	} {
		t.Run(c.name, func(t *testing.T) {
			bin := t.TempDir()
			started := filepath.Join(bin, "pid")
			script := fmt.Sprintf("#!/bin/sh\necho $$ >%s\n%s\n", started, c.tcpdump)
			if err := os.WriteFile(filepath.Join(bin, "tcpdump"), []byte(script), 0o755); err != nil {
				t.Fatal(err)
			}
			t.Setenv("PATH", bin+":"+os.Getenv("PATH"))
			run := func(ctx context.Context, argv ...string) (string, error) {
				cmd := exec.CommandContext(ctx, argv[0], argv[1:]...)
				var out strings.Builder
				cmd.Stdout, cmd.Stderr, cmd.WaitDelay = &out, &out, 100*time.Millisecond
				err := cmd.Run()
				if err != nil {
					err = fmt.Errorf("%w: %s", err, out.String())
				}
				return out.String(), err
			}
			ctx, cancel := context.WithTimeout(t.Context(), 2*time.Second)
			defer cancel()
			name := fmt.Sprintf("test.%d", os.Getpid())
			got, err := startCapture(ctx, run, "eth0", name, "ip")
			if (err == nil) != c.begins || err != nil && !strings.Contains(err.Error(), c.want) {
				t.Fatalf("got %v, want %q", err, c.want)
			}
			if c.begins {
				cancel() // interrupted
				got.end(ctx)
			}
			pid, err := os.ReadFile(started)
			if err != nil {
				t.Fatal(err)
			}
			for deadline := time.Now().Add(5 * time.Second); ; time.Sleep(10 * time.Millisecond) {
				if _, err := os.Stat("/proc/" + strings.TrimSpace(string(pid))); err != nil {
					break
				}
				if time.Now().After(deadline) {
					t.Fatalf("process %s runs on", pid)
				}
			}
			if left, _ := filepath.Glob("/tmp/wire." + name + "*"); len(left) > 0 {
				t.Errorf("left: %v", left)
			}
		})
	}
}
