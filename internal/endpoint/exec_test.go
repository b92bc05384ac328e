// SPDX-License-Identifier: Apache-2.0

package endpoint_test

import (
	"bytes"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/lash-net/lash/internal/testutil"
)

// buildPlugin builds the plugin as the image has it.
func buildPlugin(t testing.TB) string {
	t.Helper()
	testutil.NeedRoot(t)
	binary := filepath.Join(t.TempDir(), "lash-cni")
	build := exec.Command("go", "build", "-trimpath", "-ldflags", "-s -w", "-o", binary, "github.com/lash-net/lash/cmd/lash-cni")
	build.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := build.CombinedOutput(); err != nil {
		t.Fatalf("build the plugin: %v\n%s", err, out)
	}
	return binary
}

// execute runs the plugin as a runtime does and returns its output and how long it took.
func (n *node) execute(binary, command, container string, netns *os.File) (string, time.Duration, error) {
	cmd := exec.Command(binary)
	cmd.Stdin = bytes.NewReader(n.conf("1.0.0", nil))
	for key, value := range podEnv(command, container, netns) {
		cmd.Env = append(cmd.Env, key+"="+value)
	}
	start := time.Now()
	out, err := cmd.Output()
	return string(out), time.Since(start), err
}

func TestPluginIsSmall(t *testing.T) {
	info, err := os.Stat(buildPlugin(t))
	if err != nil {
		t.Fatal(err)
	}
	const limit = 4 << 20
	if info.Size() > limit {
		t.Errorf("the plugin has %d bytes, more than %d", info.Size(), limit)
	}
	t.Logf("the plugin has %d bytes", info.Size())
}

func TestExecutedPluginAddsAndDeletes(t *testing.T) {
	n := newNode(t)
	binary, pod := buildPlugin(t), testutil.Netns(t)
	out, _, err := n.execute(binary, "ADD", "c1", pod)
	if err != nil || !strings.Contains(out, `"address":"10.0.2.2/32"`) {
		t.Fatalf("ADD: %v %s", err, out)
	}
	if got := testutil.In(t, pod, "ip", "route"); !strings.Contains(got, "default via 10.0.2.1 dev eth0") {
		t.Errorf("routes of the pod:\n%s", got)
	}
	if out, _, err := n.execute(binary, "DEL", "c1", pod); err != nil || out != "" {
		t.Errorf("DEL: %v %s", err, out)
	}
	if left := n.left(); left != "" {
		t.Errorf("left: %s", left)
	}
	out, _, err = n.execute(binary, "ADD", "../c1", pod)
	if err == nil || !strings.Contains(out, `"code":4`) || !strings.Contains(out, "CNI_") {
		t.Errorf("ADD of a bad id: %v %s", err, out)
	}
}

// BenchmarkAdd is the time from executing the plugin to its answer, with 100 pods on the node: one after another, and
// several at once. The datapath is a fake: programs and rows cost microseconds.
func BenchmarkAdd(b *testing.B) {
	for _, parallel := range []int{1, 4} {
		b.Run(fmt.Sprintf("parallel=%d", parallel), func(b *testing.B) {
			n := newNode(b)
			binary := buildPlugin(b)
			const pods = 100
			for i := range pods {
				if out, _, err := n.execute(binary, "ADD", fmt.Sprintf("old%d", i), testutil.Netns(b)); err != nil {
					b.Fatalf("ADD: %v %s", err, out)
				}
			}
			namespaces := make([]*os.File, parallel)
			for i := range namespaces {
				namespaces[i] = testutil.Netns(b)
			}
			var all []time.Duration
			took := make(chan time.Duration, parallel)
			b.ResetTimer()
			for range b.N {
				for i := range parallel {
					go func() {
						out, d, err := n.execute(binary, "ADD", fmt.Sprintf("new%d", i), namespaces[i])
						if err != nil {
							b.Errorf("ADD: %v %s", err, out)
						}
						took <- d
					}()
				}
				for range parallel {
					all = append(all, <-took)
				}
				b.StopTimer()
				for i := range parallel {
					if out, _, err := n.execute(binary, "DEL", fmt.Sprintf("new%d", i), nil); err != nil {
						b.Errorf("DEL: %v %s", err, out)
					}
				}
				b.StartTimer()
			}
			slices.Sort(all)
			for name, q := range map[string]float64{"p50-ms": 0.50, "p99-ms": 0.99} {
				b.ReportMetric(float64(all[int(q*float64(len(all)-1))])/float64(time.Millisecond), name)
			}
		})
	}
}
