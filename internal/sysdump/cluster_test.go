// SPDX-License-Identifier: Apache-2.0

package sysdump

import (
	"archive/tar"
	"bytes"
	"cmp"
	"compress/gzip"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	"k8s.io/client-go/dynamic"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/rest"

	"github.com/lash-net/lash/api/agent"
	"github.com/lash-net/lash/internal/model"
	"github.com/lash-net/lash/internal/testutil"
)

// cluster is an API server with three nodes, the agent of the third of which is dead.
type cluster struct {
	mu    sync.Mutex
	asked []string
}

func (c *cluster) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	c.mu.Lock()
	c.asked = append(c.asked, r.URL.String())
	c.mu.Unlock()
	w.Header().Set("Content-Type", "application/json")
	pod := func(node string, restarts int) string {
		return fmt.Sprintf(`{"metadata": {"name": "lash-%[1]s", "namespace": "kube-system", "labels": {"k8s-app": "lash"}}, "spec": {"nodeName": %[1]q, "containers": [{"name": "lash-agent", "env": [{"name": "API_TOKEN", "value": "s3cret"}]}]},
			"status": {"phase": "Running", "containerStatuses": [{"name": "lash-agent", "restartCount": %d}]}}`, node, restarts)
	}
	list := func(items ...string) {
		kind := map[string]string{"nodes": "NodeList", "pods": "PodList"}[r.URL.Path[strings.LastIndexByte(r.URL.Path, '/')+1:]]
		fmt.Fprintf(w, `{"kind": %q, "apiVersion": "v1", "metadata": {}, "items": [%s]}`, cmp.Or(kind, "List"), strings.Join(items, ","))
	}
	switch p := r.URL.Path; {
	case strings.HasSuffix(p, "/log"):
		w.Header().Set("Content-Type", "text/plain")
		fmt.Fprintf(w, "log of %s %s\nAuthorization: Bearer s3crets3cret\n", p, r.URL.RawQuery)
	case p == "/api/v1/nodes":
		list(`{"metadata": {"name": "n1"}}`, `{"metadata": {"name": "n2"}}`, `{"metadata": {"name": "n3"}}`, `{"metadata": {"name": "n4"}}`)
	case strings.HasPrefix(p, "/api/v1/namespaces/kube-system/pods") && strings.Contains(r.URL.Query().Get("labelSelector"), "lash-operator"):
		list(`{"metadata": {"name": "lash-operator-1", "namespace": "kube-system"}, "status": {"containerStatuses": [{"name": "lash-operator"}]}}`)
	case strings.HasPrefix(p, "/api/v1/namespaces/kube-system/pods"):
		list(pod("n1", 0), pod("n2", 2), pod("n3", 5))
	case p == "/api/v1/services" && r.URL.Query().Get("continue") == "":
		fmt.Fprint(w, `{"kind": "ServiceList", "apiVersion": "v1", "metadata": {"continue": "more"}, "items": [{"metadata": {"name": "s1"}}]}`)
	case p == "/api/v1/services":
		list(`{"metadata": {"name": "s2", "annotations": {"kubectl.kubernetes.io/last-applied-configuration": "s3cret"}}}`)
	case strings.HasSuffix(p, "/configmaps/lash-config"):
		fmt.Fprint(w, `{"kind": "ConfigMap", "apiVersion": "v1", "metadata": {"name": "lash-config"}, "data": {"enable-ipv4": "true", "ipsec-key": "s3cret"}}`)
	case strings.HasPrefix(p, "/apis/networking.k8s.io"):
		w.WriteHeader(http.StatusForbidden)
		fmt.Fprint(w, `{"kind": "Status", "apiVersion": "v1", "status": "Failure", "reason": "Forbidden", "code": 403, "message": "networkpolicies is forbidden"}`)
	case p == "/apis/cilium.io/v2/ciliumnetworkpolicies":
		w.WriteHeader(http.StatusNotFound)
		fmt.Fprint(w, `{"kind": "Status", "apiVersion": "v1", "status": "Failure", "reason": "NotFound", "code": 404}`)
	case p == "/version":
		fmt.Fprint(w, `{"gitVersion": "v1.34.4"}`)
	default:
		list(fmt.Sprintf(`{"metadata": {"name": "of %s"}}`, p))
	}
}

// answering is an agent.
func answering(_ context.Context, path string, out any) error {
	var v any = map[string]string{"path": path, "token": "s3cret"}
	switch path {
	case "/v1/db":
		v = []agent.TableInfo{{Name: "routes"}, {Name: "nodes"}}
	case "/v1/endpoints":
		v = []model.Endpoint{{ID: 7}}
	case "/v1/bpf/lb":
		return errors.New("map lash_services is not there")
	}
	b, err := json.Marshal(v)
	return errors.Join(err, json.Unmarshal(b, out))
}

// unpack returns the archive's files, whose directory is dir.
func unpack(t *testing.T, archive []byte, dir string) map[string]string {
	t.Helper()
	z, err := gzip.NewReader(bytes.NewReader(archive))
	if err != nil {
		t.Fatal(err)
	}
	files := map[string]string{}
	for r := tar.NewReader(z); ; {
		h, err := r.Next()
		if err == io.EOF {
			return files
		}
		if err != nil {
			t.Fatal(err)
		}
		b, err := io.ReadAll(r)
		name, ok := strings.CutPrefix(h.Name, dir+"/")
		if _, twice := files[name]; err != nil || !ok || twice || strings.Contains(name, "..") {
			t.Errorf("%s: %v", h.Name, err)
		}
		files[name] = string(b)
	}
}

func dump(t *testing.T, o Options) (files map[string]string, problems []string, asked []string) {
	t.Helper()
	server := &cluster{}
	srv := httptest.NewServer(server)
	defer srv.Close()
	cfg := &rest.Config{Host: srv.URL, QPS: 1000, Burst: 1000}
	objects, err := dynamic.NewForConfig(cfg)
	if err != nil {
		t.Fatal(err)
	}
	client, err := kubernetes.NewForConfig(cfg)
	if err != nil {
		t.Fatal(err)
	}
	c := Cluster{Namespace: "kube-system", Objects: objects, Client: client, Node: func(ctx context.Context, pod *corev1.Pod, out io.Writer) error {
		switch pod.Spec.NodeName {
		case "n2": // one that is not what it should be
			s := tar.NewWriter(out)
			s.WriteHeader(&tar.Header{Name: "../../outside.txt", Size: 2})
			io.WriteString(s, "x\n")
			s.Flush()
			io.WriteString(out, "what is this?")
			return nil
		case "n3":
			return errors.New(`container not found ("lash-agent")`)
		}
		s := NewStream(out, time.Now())
		s.Agent(ctx, answering, o.Quick)
		return s.Close()
	}}
	o.AgentLabel, o.OtherLabel, o.Timeout = "k8s-app=lash", "name=lash-operator", 20*time.Second
	last := 0
	o.Progress = func(done, all int, _ string) {
		if done != last+1 || done > all {
			t.Errorf("progress %d of %d after %d", done, all, last)
		}
		last = done
	}
	var b bytes.Buffer
	a := NewArchive(&b, "dump", time.Now())
	if err := c.Collect(t.Context(), a, o); err != nil {
		t.Fatal(err)
	}
	if err := a.Close(); err != nil {
		t.Fatal(err)
	}
	for _, p := range a.Problems() {
		problems = append(problems, p.Part+": "+p.Err.Error())
	}
	return unpack(t, b.Bytes(), "dump"), problems, server.asked
}

func TestDump(t *testing.T) {
	for _, workers := range []int{1, 8} {
		files, problems, asked := dump(t, Options{Workers: workers, LogsLimit: 1000})
		for _, name := range []string{
			"nodes/n1/status.json", "nodes/n1/bpf/ct.json", "nodes/n1/db/routes.json", "nodes/n1/endpoint-log/7.json", "nodes/n2/outside.txt", "cluster/pods.json", "cluster/ciliumidentities.json",
			"cluster/configmaps-lash-config.json", "cluster/version.json", "logs/lash-n1-lash-agent.log", "logs/lash-n3-lash-agent-previous.log", "logs/lash-operator-1-lash-operator.log", ErrorsFile,
		} {
			if files[name] == "" {
				t.Errorf("%s is missing", name)
			}
		}
		if _, ok := files["logs/lash-n1-lash-agent-previous.log"]; ok {
			t.Error("a container that was not restarted has a log of before")
		}
		for name, text := range files {
			if strings.Contains(text, "s3cret") {
				t.Errorf("a secret is in %s: %s", name, text)
			}
		}
		if s := files["cluster/services.json"]; !strings.Contains(s, `"s1"`) || !strings.Contains(s, `"s2"`) {
			t.Errorf("services of all pages: %s", s)
		}
		want := []string{
			"cluster/ciliumnetworkpolicies.json: the cluster has no ciliumnetworkpolicies.cilium.io", "cluster/networkpolicies.json: networkpolicies is forbidden",
			"nodes/n1/bpf/lb.json: GET /v1/bpf/lb: map lash_services is not there", "nodes/n2: answer of the node: ", `nodes/n3: answer of the node: container not found ("lash-agent")`, "nodes/n4: no agent's pod runs there",
		}
		if !slices.EqualFunc(problems, want, strings.HasPrefix) || strings.Count(files[ErrorsFile], "\n") != len(want) {
			t.Errorf("problems are %q, want %q\nin the archive: %s", problems, want, files[ErrorsFile])
		}
		for _, path := range asked {
			if strings.Contains(path, "secret") {
				t.Errorf("secrets were asked for: %s", path)
			}
		}
	}
}

func TestDumpOfSomeNodes(t *testing.T) {
	files, problems, asked := dump(t, Options{Workers: 2, Nodes: []string{"n1", "nowhere"}, Quick: true, LogsSince: time.Now().Add(-time.Hour)})
	for name := range files {
		if strings.HasPrefix(name, "nodes/") && !strings.HasPrefix(name, "nodes/n1/") || strings.Contains(name, "lash-n2") || strings.Contains(name, "previous") || strings.HasSuffix(name, "bpf/ct.json") {
			t.Errorf("%s is there", name)
		}
	}
	if !slices.Contains(problems, "nodes/nowhere: there is no such node") {
		t.Errorf("problems are %q", problems)
	}
	if !slices.ContainsFunc(asked, func(p string) bool { return strings.Contains(p, "/log?") && strings.Contains(p, "sinceTime=") }) {
		t.Error("logs were asked for from their beginning")
	}
}

// A node whose agent is dead is one problem, and its kernel is told of all the same.
func TestDumpOfThisNodeWithoutAgent(t *testing.T) {
	var b bytes.Buffer
	a := NewArchive(&b, "dump", time.Now())
	ns := testutil.Netns(t)
	testutil.In(t, ns, "sh", "-ec", `ip link set lo up; ip link add v type veth peer name w; ip link set v up alias lash:test; ip addr add 10.9.8.1/24 dev v
		ip addr add fd08::1/64 dev v nodad; ip route add 10.7.0.0/16 via 10.9.8.2 proto 76 mtu 1450; ip neigh add 10.9.8.2 lladdr 02:00:00:00:00:01 dev v; tc qdisc add dev v clsact`)
	testutil.Inside(t, ns, func() {
		a.Agent(t.Context(), func(context.Context, string, any) error { return errors.New("the agent is not running") }, false)
		a.Kernel(t.Context())
	})
	if err := a.Close(); err != nil {
		t.Fatal(err)
	}
	files := unpack(t, b.Bytes(), "dump")
	for name, want := range map[string]string{
		"kernel/links.json": "lash:test", "kernel/addresses.json": "fd08::1/64", "kernel/routes.json": `"dst": "10.7.0.0/16"`, "kernel/neighbours.json": "02:00:00:00:00:01", "kernel/rules.json": "family",
		"kernel/tc.json": "clsact", "kernel/sysctls.txt": "net.ipv4.conf.v.rp_filter = ", "kernel/version.txt": "Linux", "kernel/proc/net-dev.txt": "v:", ErrorsFile: "agent: the agent is not running\n",
	} {
		if !strings.Contains(files[name], want) {
			t.Errorf("%s lacks %q: %s", name, want, files[name])
		}
	}
	if n := strings.Count(files[ErrorsFile], "\n"); n != 1 {
		t.Errorf("problems are %s", files[ErrorsFile])
	}
}
