// SPDX-License-Identifier: Apache-2.0

package endpoint_test

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"regexp"
	"runtime"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/lash-net/lash/internal/cni"
	"github.com/lash-net/lash/internal/model"
	"github.com/lash-net/lash/internal/testutil"
)

func TestAddAnswersInTheVersionOfTheConfiguration(t *testing.T) {
	const interfaces = `"interfaces":[{"name":"lxcHEX","mac":"MAC"MTU},{"name":"eth0","mac":"MAC"MTU,"sandbox":"NETNS"}]`
	const routes = `"routes":[{"dst":"10.0.2.1/32"},{"dst":"0.0.0.0/0","gw":"10.0.2.1"},{"dst":"fd00::201/128"},{"dst":"::/0","gw":"fd00::201"}]`
	for version, want := range map[string]string{
		"0.3.1": `{"cniVersion":"0.3.1",` + strings.ReplaceAll(interfaces, "MTU", "") + `,"ips":[` +
			`{"version":"4","interface":1,"address":"10.0.2.2/32","gateway":"10.0.2.1"},` +
			`{"version":"6","interface":1,"address":"fd00::202/128","gateway":"fd00::201"}],` + routes + `,"dns":{}}`,
		"0.4.0": `{"cniVersion":"0.4.0",` + strings.ReplaceAll(interfaces, "MTU", "") + `,"ips":[` +
			`{"version":"4","interface":1,"address":"10.0.2.2/32","gateway":"10.0.2.1"},` +
			`{"version":"6","interface":1,"address":"fd00::202/128","gateway":"fd00::201"}],` + routes + `,"dns":{}}`,
		"1.0.0": `{"cniVersion":"1.0.0",` + strings.ReplaceAll(interfaces, "MTU", "") + `,"ips":[` +
			`{"interface":1,"address":"10.0.2.2/32","gateway":"10.0.2.1"},` +
			`{"interface":1,"address":"fd00::202/128","gateway":"fd00::201"}],` + routes + `,"dns":{}}`,
		"1.1.0": `{"cniVersion":"1.1.0",` + strings.ReplaceAll(interfaces, "MTU", `,"mtu":1500`) + `,"ips":[` +
			`{"interface":1,"address":"10.0.2.2/32","gateway":"10.0.2.1"},` +
			`{"interface":1,"address":"fd00::202/128","gateway":"fd00::201"}],` + routes + `,"dns":{}}`,
	} {
		t.Run(version, func(t *testing.T) {
			n := newNode(t)
			pod := testutil.Netns(t)
			res := runPlugin(t, podEnv("ADD", "c1", pod), n.conf(version, nil))
			got := strings.TrimSpace(res.output)
			got = regexp.MustCompile(`lxc[0-9a-f]{12}`).ReplaceAllString(got, "lxcHEX")
			got = regexp.MustCompile(`([0-9a-f]{2}:){5}[0-9a-f]{2}`).ReplaceAllString(got, "MAC")
			got = strings.ReplaceAll(got, testutil.NetnsPath(pod), "NETNS")
			if diff := cmp.Diff(want, got); diff != "" {
				t.Errorf("(-want +got):\n%s", diff)
			}
		})
	}
}

func TestAPodsLife(t *testing.T) {
	n := newNode(t)
	pod := testutil.Netns(t)
	added := n.add("c1", pod)
	again := n.add("c1", pod)
	if diff := cmp.Diff(added.output, again.output); diff != "" {
		t.Errorf("the repeated ADD differs:\n%s", diff)
	}
	check := func(netns *os.File) result {
		var previous any
		if err := json.Unmarshal([]byte(added.output), &previous); err != nil {
			t.Fatal(err)
		}
		return runPlugin(t, podEnv("CHECK", "c1", netns), n.conf("1.1.0", map[string]any{"prevResult": previous}))
	}
	if res := check(pod); res.status != 0 || res.output != "" {
		t.Errorf("CHECK: %s", res.output)
	}
	testutil.In(t, pod, "ip", "route", "del", "default")
	if res := check(pod); res.status == 0 || !strings.Contains(res.Msg, "default via 10.0.2.1 dev eth0 is missing") {
		t.Errorf("CHECK without a default route: %s", res.output)
	}
	if got := testutil.In(t, pod, "ip", "route"); strings.Contains(got, "default") {
		t.Errorf("CHECK mended: %s", got)
	}
	mended := n.add("c1", pod)
	if testutil.In(t, pod, "ip", "-o", "route", "show", "default") == "" {
		t.Error("ADD did not make the broken endpoint anew")
	}
	added = mended
	n.dp.mu.Lock()
	clear(n.dp.attached)
	n.dp.mu.Unlock()
	if res := check(pod); res.status == 0 || !strings.Contains(res.Msg, "no programs on lxc") {
		t.Errorf("CHECK without programs: %s", res.output)
	}
	for i := range 2 {
		if res := n.call("DEL", "c1", pod); res.status != 0 || res.output != "" {
			t.Errorf("DEL %d: %s", i, res.output)
		}
	}
	if left := n.left(); left != "" {
		t.Errorf("left: %s", left)
	}
	if res := check(pod); res.status == 0 || res.Code != cni.CodeUnknownContainer {
		t.Errorf("CHECK after DEL: %s", res.output)
	}
}

func TestPodsReachTheStateUpAtOnce(t *testing.T) {
	n := newNode(t)
	for i := range 5 {
		pod := testutil.Netns(t)
		n.add(fmt.Sprintf("c%d", i), pod)
		start := time.Now()
		for !strings.Contains(testutil.In(t, pod, "ip", "link", "show", "dev", "eth0"), "state UP") {
			if time.Since(start) > 900*time.Millisecond { // left to itself the kernel tells of carriers once a second
				t.Fatal("eth0 of the pod shows no carrier")
			}
		}
	}
}

func TestDeleteWithoutNamespace(t *testing.T) {
	n := newNode(t)
	pod := testutil.Netns(t)
	n.add("c1", pod)
	pod.Close()
	if res := n.call("DEL", "c1", nil); res.status != 0 {
		t.Errorf("DEL: %s", res.text())
	}
	if left := n.left(); left != "" {
		t.Errorf("left: %s", left)
	}
}

func TestFailedAddLeavesNothing(t *testing.T) {
	fault := func(step string) func(*node) { return func(n *node) { n.faults.set(step) } }
	sabotage := func(command string) func(*node) { return func(n *node) { n.devs.sabotage.Store(&command) } }
	for name, break_ := range map[string]func(*node){
		"network": fault("network"), "allocate": fault("allocate"), "create": fault("create"), "attach": fault("attach"),
		"rows": fault("sync"), "start": fault("start"),
		"device":     sabotage("ip link del eth0"),
		"route":      sabotage("ip link set eth0 up; ip route add 10.0.2.1 dev eth0 scope link"),
		"route 6":    sabotage("ip link set eth0 up; ip -6 route add default dev eth0"),
		"checkpoint": func(n *node) { breakCheckpoints(n, 0) },
	} {
		t.Run(name, func(t *testing.T) {
			n := newNode(t)
			pod := testutil.Netns(t)
			break_(n)
			res := n.call("ADD", "c1", pod)
			if res.status != 1 || res.Code == 0 || res.Msg == "" {
				t.Errorf("ADD: status %d, %s", res.status, res.output)
			}
			n.faults.set()
			n.devs.sabotage.Store(nil)
			if name == "checkpoint" {
				breakCheckpoints(n, 0o700)
			}
			if name == "rows" { // which the loop removes when it can
				clear(n.dp.rows)
			}
			if left := n.left(); left != "" {
				t.Errorf("left: %s", left)
			}
			if got := testutil.In(t, pod, "ip", "-o", "link"); strings.Count(got, "\n") != 1 {
				t.Errorf("left in the pod:\n%s", got)
			}
			n.add("c1", pod)
			n.call("DEL", "c1", pod)
			if left := n.left(); left != "" {
				t.Errorf("left after all: %s", left)
			}
		})
	}
}

// breakCheckpoints makes the directory a file for mode 0, which stops root, too, and a directory again for another.
func breakCheckpoints(n *node, mode os.FileMode) {
	dir := n.path("state/endpoints")
	if err := os.RemoveAll(dir); err != nil {
		n.t.Fatal(err)
	}
	err := os.WriteFile(dir, nil, 0o600)
	if mode != 0 {
		err = errors.Join(os.Remove(dir), os.Mkdir(dir, mode))
	}
	if err != nil {
		n.t.Fatal(err)
	}
}

func TestFailedDeleteKeepsTheAddressAndIsRepeated(t *testing.T) {
	n := newNode(t)
	pod := testutil.Netns(t)
	n.add("c1", pod)
	n.faults.set("delete")
	if res := n.call("DEL", "c1", pod); res.status == 0 || !strings.Contains(res.Msg, "injected") {
		t.Errorf("DEL: %s", res.output)
	}
	if n.addrs.used() != 4 {
		t.Error("the address of a device that is still there was given back")
	}
	n.faults.set()
	if res := n.call("DEL", "c1", pod); res.status != 0 {
		t.Errorf("DEL: %s", res.output)
	}
	if left := n.left(); left != "" {
		t.Errorf("left: %s", left)
	}
}

func TestGCRemovesWhatIsNotListed(t *testing.T) {
	n := newNode(t)
	for _, container := range []string{"c1", "c2", "c3"} {
		n.add(container, testutil.Netns(t))
	}
	gc := func(more map[string]any) result {
		return runPlugin(t, map[string]string{"CNI_COMMAND": "GC", "CNI_PATH": "/opt/cni/bin"}, n.conf("1.1.0", more))
	}
	if res := gc(nil); res.status == 0 || !strings.Contains(res.Msg, "cni.dev/valid-attachments") {
		t.Errorf("GC without a list: %s", res.output)
	}
	attachments := func(containers ...string) []map[string]string {
		list := []map[string]string{}
		for _, c := range containers {
			list = append(list, map[string]string{"containerID": c, "ifname": "eth0"})
		}
		return list
	}
	if res := gc(map[string]any{"cni.dev/valid-attachments": attachments("c1", "c3"), "cni.dev/attachments": attachments("c3")}); res.status != 0 || res.output != "" {
		t.Errorf("GC: %s", res.output)
	}
	var kept []string
	for ep := range n.tables.Endpoints.All(n.tables.DB.ReadTxn()) {
		kept = append(kept, ep.ContainerID)
	}
	if diff := cmp.Diff([]string{"c1", "c3"}, kept); diff != "" {
		t.Error(diff)
	}
	if res := gc(map[string]any{"cni.dev/attachments": attachments()}); res.status != 0 {
		t.Errorf("GC of all: %s", res.output)
	}
	if left := n.left(); left != "" {
		t.Errorf("left: %s", left)
	}
}

func TestStatusSaysWhyNot(t *testing.T) {
	n := newNode(t)
	status := func() result {
		return runPlugin(t, map[string]string{"CNI_COMMAND": "STATUS", "CNI_PATH": "/opt/cni/bin"}, n.conf("1.1.0", nil))
	}
	if res := status(); res.status != 0 || res.output != "" {
		t.Errorf("STATUS: %s", res.output)
	}
	n.faults.set("network")
	if res := status(); res.Code != cni.CodeNotAvailable || !strings.Contains(res.Msg, "injected") {
		t.Errorf("STATUS: %s", res.output)
	}
	n.stop()
	if res := status(); res.Code != cni.CodeNotAvailable || !strings.Contains(res.Msg, "the lash agent on this node is not running") {
		t.Errorf("STATUS: %s", res.output)
	}
}

func TestWithoutAgentAddFailsClearlyAndDeleteIsDoneLater(t *testing.T) {
	n := newNode(t)
	pod := testutil.Netns(t)
	n.add("c1", pod)
	n.add("c2", testutil.Netns(t))
	n.stop()
	begin := time.Now()
	res := n.call("ADD", "c3", testutil.Netns(t))
	if res.Code != cni.CodeTryAgainLater || !strings.Contains(res.Msg, "the lash agent on this node is not running") || !strings.Contains(res.Details, "kubectl -n kube-system") {
		t.Errorf("ADD: %s", res.output)
	}
	if d := time.Since(begin); d > 10*time.Second { // a runtime asks again by itself
		t.Errorf("it took %s to say so", d)
	}
	for range 2 {
		if res := n.call("DEL", "c1", pod); res.status != 0 {
			t.Errorf("DEL: %s", res.output)
		}
	}
	if queued, err := cni.QueuedDeletions(n.path("deletions")); err != nil || len(queued) != 1 || queued[0].ContainerID != "c1" {
		t.Errorf("queued %v %v", queued, err)
	}
	n.start()
	if res := n.call("DEL", "c2", nil); res.status != 0 {
		t.Errorf("DEL: %s", res.output)
	}
	if left := n.left(); left != "" {
		t.Errorf("left: %s", left)
	}
}

func TestRestartKeepsEndpointsAndDropsTheRest(t *testing.T) {
	n := newNode(t)
	pod, gone := testutil.Netns(t), testutil.Netns(t)
	added := n.add("c1", pod)
	n.add("c2", gone)
	n.stop()
	// c2's device vanishes; an ADD of c9 was interrupted after the device was made; somebody else has a device, too.
	unfinished := model.Endpoint{ContainerID: "c9", ContainerIfName: "eth0", IfName: "lxc999999999999"}
	if _, err := n.devs.Host.CreatePod(context.Background(), testutil.Netns(t), unfinished, model.PodNetwork{MTU: 1500}); err != nil {
		t.Fatal(err)
	}
	testutil.In(t, n.ns, "sh", "-ec", "ip link add lxcdeadbeef0000 type veth peer name foreign")
	testutil.In(t, gone, "ip", "link", "del", "eth0")
	n.start()

	var rows []model.Endpoint
	for ep := range n.tables.Endpoints.All(n.tables.DB.ReadTxn()) {
		rows = append(rows, ep)
	}
	if len(rows) != 1 || rows[0].ContainerID != "c1" || rows[0].State != model.EndpointReady || rows[0].UID != "u-c1" {
		t.Errorf("rows %+v", rows)
	}
	if complete, _ := n.tables.Endpoints.Initialized(n.tables.DB.ReadTxn()); !complete {
		t.Error("the table is not complete")
	}
	links := testutil.In(t, n.ns, "ip", "-o", "link")
	if strings.Contains(links, "lxc999999999999") || !strings.Contains(links, "lxcdeadbeef0000") {
		t.Errorf("links:\n%s", links)
	}
	if n.addrs.used() != 4 {
		t.Errorf("%d addresses in use", n.addrs.used())
	}
	if again := n.add("c1", pod); again.output != added.output {
		t.Errorf("ADD after the restart: %s", again.output)
	}
	if third := n.add("c3", testutil.Netns(t)); third.IPs[0].Address == added.IPs[0].Address {
		t.Error("an address in use was given out")
	}
}

// The agent starts in another routing mode: pods of before get the route MTU of it, and are intact in its eyes.
func TestRestartInAnotherModeReroutesPods(t *testing.T) {
	n := newNode(t)
	pod, away := testutil.Netns(t), testutil.Netns(t)
	added := n.add("c1", pod)
	n.add("c2", away)
	for _, mtu := range []int{1450, 1500, 1450} {
		n.stop()
		testutil.In(t, away, "ip", "link", "set", "eth0", "name", fmt.Sprintf("eth%d", mtu)) // its owner has renamed it: left alone
		n.routeMTU = mtu
		n.start()
		if got := testutil.In(t, pod, "ip", "route", "show", "default"); !strings.Contains(got, fmt.Sprintf("mtu %d", mtu)) {
			t.Errorf("route in the pod: %s, want mtu %d", got, mtu)
		}
		if again := n.add("c1", pod); again.IPs[0].Address != added.IPs[0].Address {
			t.Errorf("a repeated ADD made it anew: %s", again.output)
		}
		if got := n.tables.Endpoints.NumObjects(n.tables.DB.ReadTxn()); got != 2 {
			t.Errorf("%d endpoints", got)
		}
		testutil.In(t, away, "ip", "link", "set", fmt.Sprintf("eth%d", mtu), "name", "eth0")
	}
}

func TestUnreadableCheckpointKeepsItsPodRunning(t *testing.T) {
	n := newNode(t)
	pod := testutil.Netns(t)
	n.add("c1", pod)
	n.stop()
	if err := os.WriteFile(n.path("state/endpoints/1.json"), []byte(`{"ID":1,`), 0o600); err != nil {
		t.Fatal(err)
	}
	n.start()
	if links, err := n.devs.PodLinks(context.Background()); err != nil || len(links) != 1 {
		t.Errorf("links %v %v", links, err)
	}
	if res := n.call("DEL", "c1", pod); res.status != 0 {
		t.Errorf("DEL: %s", res.output)
	}
	if links, err := n.devs.PodLinks(context.Background()); err != nil || len(links) != 0 {
		t.Errorf("links %v %v", links, err)
	}
}

func TestSetIdentityReachesTableAndCheckpoint(t *testing.T) {
	n := newNode(t)
	n.add("c1", testutil.Netns(t))
	if err := n.endpoints.SetIdentity(1, 4711, map[string]string{"app": "x"}); err != nil {
		t.Fatal(err)
	}
	n.stop()
	n.start()
	for ep := range n.tables.Endpoints.All(n.tables.DB.ReadTxn()) {
		if ep.Identity != 4711 || ep.Labels["app"] != "x" {
			t.Errorf("identity %s, labels %v", ep.Identity, ep.Labels)
		}
	}
}

func TestMTUOfTheConfigurationHasLimits(t *testing.T) {
	n := newNode(t)
	for field, value := range map[string]int{"mtu": 1279, "route-mtu": 1501} {
		res := runPlugin(t, podEnv("ADD", "c1", testutil.Netns(t)), n.conf("1.1.0", map[string]any{field: value}))
		if res.Code != cni.CodeInvalidConfig || !strings.Contains(res.Msg, field) || res.Details == "" {
			t.Errorf("%s %d: %s", field, value, res.output)
		}
	}
	if res := runPlugin(t, podEnv("ADD", "c1", testutil.Netns(t)), n.conf("1.1.0", map[string]any{"mtu": 9000})); res.Code != cni.CodeInvalidConfig {
		t.Errorf("more than the node's: %s", res.output)
	}
	pod := testutil.Netns(t)
	res := runPlugin(t, podEnv("ADD", "c1", pod), n.conf("1.1.0", map[string]any{"mtu": 1400, "route-mtu": 1350}))
	if res.status != 0 || res.Interfaces[1].MTU != 1400 || res.Routes[1].MTU != 1350 {
		t.Errorf("ADD: %s", res.output)
	}
	if got := testutil.In(t, pod, "ip", "route"); !strings.Contains(got, "default via 10.0.2.1 dev eth0 mtu 1350") {
		t.Errorf("ip route: %s", got)
	}
	if left := n.left(); strings.Count(left, "device") != 1 {
		t.Errorf("refused ADDs left something: %s", left)
	}
}

func TestManyPodsAtOnce(t *testing.T) {
	n := newNode(t)
	const pods = 100
	namespaces := make([]*os.File, pods)
	for i := range namespaces {
		namespaces[i] = testutil.Netns(t)
	}
	files, routines, netns := openFiles(t), runtime.NumGoroutine(), ownNetns(t)
	var wg sync.WaitGroup
	results := make([]result, pods)
	for i := range pods {
		wg.Go(func() { results[i] = n.call("ADD", fmt.Sprintf("c%d", i), namespaces[i]) })
		wg.Go(func() { n.call("ADD", fmt.Sprintf("c%d", i), namespaces[i]) }) // the runtime lost patience and repeats
	}
	wg.Wait()
	seen := map[string]bool{}
	for i, res := range results {
		if res.status != 0 {
			t.Fatalf("ADD %d: %s", i, res.text())
		}
		for _, ip := range res.IPs {
			if seen[ip.Address] {
				t.Errorf("address %s twice", ip.Address)
			}
			seen[ip.Address] = true
		}
	}
	for i := range pods {
		wg.Go(func() { n.call("DEL", fmt.Sprintf("c%d", i), namespaces[i]) })
	}
	wg.Wait()
	if left := n.left(); left != "" {
		t.Errorf("left: %s", left)
	}
	for deadline := time.Now().Add(5 * time.Second); openFiles(t) > files || runtime.NumGoroutine() > routines; runtime.Gosched() {
		if time.Now().After(deadline) {
			t.Errorf("files %d, were %d; goroutines %d, were %d", openFiles(t), files, runtime.NumGoroutine(), routines)
			break
		}
	}
	if now := ownNetns(t); now != netns {
		t.Errorf("threads have strayed into another namespace: %s, was %s", now, netns)
	}
}

func ownNetns(t testing.TB) string {
	t.Helper()
	link, err := os.Readlink("/proc/thread-self/ns/net")
	if err != nil {
		t.Fatal(err)
	}
	return link
}

func openFiles(t testing.TB) int {
	t.Helper()
	entries, err := os.ReadDir("/proc/self/fd")
	if err != nil {
		t.Fatal(err)
	}
	return len(entries)
}
