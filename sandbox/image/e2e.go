// SPDX-License-Identifier: Apache-2.0

package image

import (
	"fmt"
	"path/filepath"
	"slices"

	"github.com/lash-net/lash/sandbox/pki"
)

// Names under which the specs of the Kubernetes e2e suite about networks ask for their images. Pods that
// need no registry start with what is on the node.
var (
	agnhostNames = []string{"registry.k8s.io/e2e-test-images/agnhost:2.56", "registry.k8s.io/e2e-test-images/agnhost:2.53", "registry.k8s.io/e2e-test-images/jessie-dnsutils:1.7"}
	shellNames   = []string{"registry.k8s.io/e2e-test-images/busybox:1.37.0-1", "registry.k8s.io/build-image/distroless-iptables:v0.7.14"}
	pauseNames   = []string{"registry.k8s.io/pause:3.10.1"}
	issue74839   = []string{"registry.k8s.io/e2e-test-images/regression-issue-74839:1.2"}
)

// EnsureE2E writes the archives of the e2e suite's images into dir unless they are there. One tree serves all
// that only need programs of a distribution and agnhost; its names differ in what they run.
func EnsureE2E(dir string, bin func(string) string, say func(string, ...any)) (archives []string, err error) {
	tools, err := lookTools(append(slices.Clone(hostTools), "wget", "iperf"))
	if err != nil {
		return nil, err
	}
	// `agnhost porter` serves TLS with a certificate that its callers do not check
	certs := pki.Dir(filepath.Join(dir, "porter"))
	if err := certs.CA("ca"); err != nil {
		return nil, err
	}
	if err := certs.Leaf("localhost", "ca", "localhost", nil, []string{"localhost"}); err != nil {
		return nil, err
	}
	crt, key := certs.Path("localhost.crt"), certs.Path("localhost.key")
	env := []string{searchPath}
	recipes := []recipe{
		{name: "e2e-agnhost", inputs: append([]string{bin("agnhost"), bin("coredns"), busybox, crt, key}, tools...), images: []Image{
			{Config{Entrypoint: []string{"/agnhost"}, Cmd: []string{"pause"}, Env: env}, agnhostNames},
			{Config{Cmd: []string{"sh"}, Env: env}, shellNames},
		}, make: func() (*Tree, error) {
			t, err := shell(tools)
			if err != nil {
				return nil, err
			}
			t.Link("/agnhost-2", "agnhost")
			t.Dir("/uploads", 0o755)                            // of `agnhost netexec`
			t.File("/etc/wgetrc", []byte("tries = 1\n"), 0o644) // as busybox's, which the suite expects
			for to, from := range map[string]string{"/agnhost": bin("agnhost"), "/coredns": bin("coredns"), "/localhost.crt": crt, "/localhost.key": key} {
				if err := t.Copy(to, from, 0o755); err != nil {
					return nil, err
				}
			}
			return t, nil
		}},
		{name: "e2e-regression-issue-74839", inputs: []string{bin("regression-issue-74839")}, images: []Image{{Config{Entrypoint: []string{"/regression-issue-74839"}}, issue74839}}, make: func() (*Tree, error) {
			t := base()
			return t, t.Copy("/regression-issue-74839", bin("regression-issue-74839"), 0o755)
		}},
		{name: "e2e-pause", inputs: []string{bin("pause")}, images: []Image{{Config{Entrypoint: []string{"/pause"}, User: "65535:65535"}, pauseNames}}, make: func() (*Tree, error) {
			t := New()
			return t, t.Copy("/pause", bin("pause"), 0o755)
		}},
	}
	for i, r := range recipes {
		recipes[i].layout = fmt.Sprint(r.images) // names and configurations follow the suite
	}
	return ensure(dir, say, recipes)
}
