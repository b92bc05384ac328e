// SPDX-License-Identifier: Apache-2.0

package node

import (
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/lash-net/lash/sandbox/plan"
)

func TestOnlyDiskMountsAreShownToANode(t *testing.T) {
	got := diskMounts(`27 1 254:0 / / rw - ext4 /dev/vda rw
22 27 0:21 / /proc rw - proc proc rw
40 27 254:1 / /home rw shared:1 - ext4 /dev/vdb rw
41 27 254:2 / /srv/a\040b rw shared:2 - xfs /dev/vdc rw
42 27 0:5 / /run rw - tmpfs tmpfs rw
43 42 0:4 net:[1] /run/netns/x rw - nsfs nsfs rw
44 27 0:4 net:[2] /home/me/ns rw - nsfs nsfs rw
45 27 0:50 / /var/lib/docker/overlay2/x/merged rw - overlay overlay rw
46 27 0:51 / /var/lib/lash-sandbox/a/nodes/n1/root rw - tmpfs x rw
47 27 0:52 / /tmp/x rw - tmpfs x rw
`)
	if want := []string{"/home", "/srv/a b"}; !slices.Equal(got, want) {
		t.Errorf("got %q, want %q", got, want)
	}
}

func TestSpecSurvivesItsDirectory(t *testing.T) {
	v4, v6 := plan.NodeAddrs(3)
	s := Spec{Name: "n3", Dir: t.TempDir(), IP4: v4, IP6: v6, Proxy: "iptables", DNS: plan.DNS4,
		Pods: []netip.Prefix{plan.Pods4, plan.Pods6}, Sandbox: "sandbox.local/pause:1", Kubelet: "/k", MaxPods: 7}
	if err := s.Write(); err != nil {
		t.Fatal(err)
	}
	got, err := Load(s.Dir)
	if err != nil || got.Name != s.Name || got.IP6 != s.IP6 || len(got.Pods) != 2 {
		t.Errorf("got %+v, %v", got, err)
	}
	for _, d := range Kept {
		if _, err := os.Stat(filepath.Join(s.Dir, d)); err != nil {
			t.Error(err)
		}
	}
	if args := strings.Join(got.kubelet(), " "); !strings.Contains(args, "--node-ip=172.18.0.13,fd00:172:18::13") {
		t.Errorf("kubelet is not dual-stack: %s", args)
	}
	kubelet, err := os.ReadFile(filepath.Join(s.Dir, "etc/kubernetes/kubelet.yaml"))
	if err != nil || !strings.Contains(string(kubelet), "maxPods: 7\n") || strings.Contains(string(kubelet), "%!") {
		t.Errorf("%v\n%s", err, kubelet)
	}
}
