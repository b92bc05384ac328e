// SPDX-License-Identifier: Apache-2.0

package cni

import (
	"bytes"
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

// plugin runs one execution with a socket nobody listens on.
func plugin(t *testing.T, env map[string]string, stdin string) (status int, output map[string]any) {
	t.Helper()
	var stdout, stderr bytes.Buffer
	status = Plugin{
		Getenv: func(key string) string { return env[key] }, Stdin: strings.NewReader(stdin), Stdout: &stdout, Stderr: &stderr,
	}.Run()
	if stdout.Len() > 0 {
		if err := json.Unmarshal(stdout.Bytes(), &output); err != nil {
			t.Fatalf("output %q: %v", stdout.String(), err)
		}
	}
	return status, output
}

func with(m map[string]string, kv ...string) map[string]string {
	c := map[string]string{}
	for k, v := range m {
		c[k] = v
	}
	for i := 0; i < len(kv); i += 2 {
		c[kv[i]] = kv[i+1]
	}
	return c
}

func TestEveryBadInputNamesFieldAndRemedy(t *testing.T) {
	good := map[string]string{
		"CNI_COMMAND": "ADD", "CNI_CONTAINERID": "c0ffee", "CNI_IFNAME": "eth0", "CNI_NETNS": "/proc/self/ns/net",
		"CNI_ARGS": "K8S_POD_NAMESPACE=default;K8S_POD_NAME=web-0",
	}
	check := with(good, "CNI_COMMAND", "CHECK")
	gc := map[string]string{"CNI_COMMAND": "GC"}
	conf := func(more string) string {
		return `{"cniVersion":"1.1.0","name":"lash","type":"lash-cni","socket":"` + t.TempDir() + `/none.sock"` + more + `}`
	}
	long := strings.Repeat("x", 300)
	for name, c := range map[string]struct {
		env   map[string]string
		stdin string
		code  int
		field string
	}{
		"no command":                 {with(good, "CNI_COMMAND", ""), conf(""), 4, "CNI_COMMAND"},
		"unknown command":            {with(good, "CNI_COMMAND", "UPDATE"), conf(""), 4, "CNI_COMMAND"},
		"command in lower case":      {with(good, "CNI_COMMAND", "add"), conf(""), 4, "CNI_COMMAND"},
		"no container id":            {with(good, "CNI_CONTAINERID", ""), conf(""), 4, "CNI_CONTAINERID"},
		"container id with slash":    {with(good, "CNI_CONTAINERID", "../../etc"), conf(""), 4, "CNI_CONTAINERID"},
		"container id with space":    {with(good, "CNI_CONTAINERID", "a b"), conf(""), 4, "CNI_CONTAINERID"},
		"container id with dash":     {with(good, "CNI_CONTAINERID", "-a"), conf(""), 4, "CNI_CONTAINERID"},
		"container id not ASCII":     {with(good, "CNI_CONTAINERID", "ä"), conf(""), 4, "CNI_CONTAINERID"},
		"container id too long":      {with(good, "CNI_CONTAINERID", long), conf(""), 4, "CNI_CONTAINERID"},
		"no device name":             {with(good, "CNI_IFNAME", ""), conf(""), 4, "CNI_IFNAME"},
		"device name too long":       {with(good, "CNI_IFNAME", "eth0123456789012"), conf(""), 4, "CNI_IFNAME"},
		"device name with slash":     {with(good, "CNI_IFNAME", "eth/0"), conf(""), 4, "CNI_IFNAME"},
		"device name with colon":     {with(good, "CNI_IFNAME", "eth0:1"), conf(""), 4, "CNI_IFNAME"},
		"device name with space":     {with(good, "CNI_IFNAME", "eth 0"), conf(""), 4, "CNI_IFNAME"},
		"device name dot dot":        {with(good, "CNI_IFNAME", ".."), conf(""), 4, "CNI_IFNAME"},
		"device name lo":             {with(good, "CNI_IFNAME", "lo"), conf(""), 4, "CNI_IFNAME"},
		"device name with control":   {with(good, "CNI_IFNAME", "eth\x01"), conf(""), 4, "CNI_IFNAME"},
		"device name not UTF-8":      {with(good, "CNI_IFNAME", "eth\xff"), conf(""), 4, "CNI_IFNAME"},
		"no namespace":               {with(good, "CNI_NETNS", ""), conf(""), 4, "CNI_NETNS"},
		"namespace relative":         {with(good, "CNI_NETNS", "netns/c1"), conf(""), 4, "CNI_NETNS"},
		"namespace not there":        {with(good, "CNI_NETNS", "/nowhere/at/all"), conf(""), 4, "CNI_NETNS"},
		"namespace too long":         {with(good, "CNI_NETNS", "/"+strings.Repeat("x", 5000)), conf(""), 4, "CNI_NETNS"},
		"arguments without value":    {with(good, "CNI_ARGS", "K8S_POD_NAME"), conf(""), 4, "CNI_ARGS"},
		"arguments without key":      {with(good, "CNI_ARGS", "=web-0"), conf(""), 4, "CNI_ARGS"},
		"pod name with slash":        {with(good, "CNI_ARGS", "K8S_POD_NAMESPACE=d;K8S_POD_NAME=a/b"), conf(""), 4, "K8S_POD_NAME"},
		"pod without namespace":      {with(good, "CNI_ARGS", "K8S_POD_NAME=web-0"), conf(""), 4, "K8S_POD_NAMESPACE"},
		"pod uid with quote":         {with(good, "CNI_ARGS", `K8S_POD_NAMESPACE=d;K8S_POD_NAME=a;K8S_POD_UID="`), conf(""), 4, "K8S_POD_UID"},
		"no configuration":           {good, "", 6, "standard input"},
		"blank configuration":        {good, " \n", 6, "standard input"},
		"not JSON":                   {good, "cniVersion: 1.0.0", 6, "line 1"},
		"cut off":                    {good, "{\n\"cniVersion\":\n", 6, "line 3"},
		"an array":                   {good, "[]", 6, "network configuration"},
		"version is a number":        {good, `{"cniVersion":1.1,"name":"lash"}`, 6, "cniVersion"},
		"no version":                 {good, `{"name":"lash"}`, 7, "cniVersion"},
		"version too old":            {good, `{"cniVersion":"0.2.0","name":"lash"}`, 1, "cniVersion"},
		"version too new":            {good, `{"cniVersion":"2.0.0","name":"lash"}`, 1, "cniVersion"},
		"version long":               {good, `{"cniVersion":"` + long + `","name":"lash"}`, 1, "cniVersion"},
		"no name":                    {good, `{"cniVersion":"1.0.0"}`, 7, "name"},
		"name with space":            {good, `{"cniVersion":"1.0.0","name":"my net"}`, 7, "name"},
		"socket relative":            {good, `{"cniVersion":"1.0.0","name":"lash","socket":"cni.sock"}`, 7, "socket"},
		"deletions relative":         {good, `{"cniVersion":"1.0.0","name":"lash","deletions":"d"}`, 7, "deletions"},
		"MTU negative":               {good, conf(`,"mtu":-1`), 7, "mtu"},
		"MTU too big":                {good, conf(`,"mtu":65536`), 7, "mtu"},
		"MTU text":                   {good, conf(`,"mtu":"1500"`), 6, "mtu"},
		"route MTU too small":        {good, conf(`,"route-mtu":67`), 7, "route-mtu"},
		"second in the list":         {good, conf(`,"prevResult":{"ips":[]}`), 7, "prevResult"},
		"CHECK in 0.3.1":             {check, `{"cniVersion":"0.3.1","name":"lash"}`, 1, "cniVersion"},
		"CHECK without result":       {check, conf(""), 7, "prevResult"},
		"CHECK without addresses":    {check, conf(`,"prevResult":{"interfaces":[]}`), 7, "prevResult"},
		"CHECK of a bad address":     {check, conf(`,"prevResult":{"ips":[{"address":"10.0.0.300/32"}]}`), 7, "prevResult"},
		"CHECK of a bare address":    {check, conf(`,"prevResult":{"ips":[{"address":"10.0.0.3"}]}`), 7, "prevResult"},
		"CHECK of a wrong interface": {check, conf(`,"prevResult":{"ips":[{"address":"10.0.0.3/32","interface":4}]}`), 7, "prevResult"},
		"CHECK interface negative":   {check, conf(`,"prevResult":{"ips":[{"address":"10.0.0.3/32","interface":-1}]}`), 7, "prevResult"},
		"GC without list":            {gc, conf(""), 7, "cni.dev/valid-attachments"},
		"GC in 1.0.0":                {gc, `{"cniVersion":"1.0.0","name":"lash"}`, 1, "cniVersion"},
		"GC of a bad container":      {gc, conf(`,"cni.dev/valid-attachments":[{"containerID":"a/b","ifname":"eth0"}]`), 7, "containerID"},
		"GC of a bad device":         {gc, conf(`,"cni.dev/attachments":[{"containerID":"a","ifname":""}]`), 7, "ifname"},
		"GC with a text":             {gc, conf(`,"cni.dev/valid-attachments":"all"`), 6, "cni.dev/valid-attachments"},
		"STATUS in 0.4.0":            {map[string]string{"CNI_COMMAND": "STATUS"}, `{"cniVersion":"0.4.0","name":"lash"}`, 1, "cniVersion"},
	} {
		t.Run(name, func(t *testing.T) {
			status, out := plugin(t, c.env, c.stdin)
			msg, _ := out["msg"].(string)
			details, _ := out["details"].(string)
			if status != 1 || out["code"] != float64(c.code) || !strings.Contains(msg, c.field) || details == "" {
				t.Errorf("status %d, code %v, %q; %q; want code %d, a message with %q, and a remedy", status, out["code"], msg, details, c.code, c.field)
			}
			if len(msg) > 300 {
				t.Errorf("a message of %d characters", len(msg))
			}
			version, _ := out["cniVersion"].(string)
			if checkVersion(version) != nil {
				t.Errorf("the error is in version %q", version)
			}
		})
	}
}

func TestVersionNeedsNothing(t *testing.T) {
	for _, stdin := range []string{"", `{"cniVersion":"0.4.0"}`, "nonsense"} {
		status, out := plugin(t, map[string]string{"CNI_COMMAND": "VERSION"}, stdin)
		if status != 0 || fmt.Sprint(out["supportedVersions"]) != "[0.3.1 0.4.0 1.0.0 1.1.0]" || out["cniVersion"] != "1.1.0" {
			t.Errorf("%q: status %d, %v", stdin, status, out)
		}
	}
}

func requests() map[string]Request {
	one := 1
	base := Request{
		Protocol: Protocol, Command: "ADD", CNIVersion: "1.1.0", Network: "lash", ContainerID: "c0ffee", IfName: "eth0",
		Netns: "/var/run/netns/cni-1", Pod: Pod{Namespace: "default", Name: "web-0", UID: "0f"}, MTU: 1400, RouteMTU: 1350,
	}
	del, check, status, gc := base, base, Request{Protocol: Protocol, Command: "STATUS", CNIVersion: "1.1.0", Network: "lash"}, base
	del.Command, del.Netns = "DEL", ""
	check.Command = "CHECK"
	check.PrevResult = &PrevResult{Interfaces: []Interface{{Name: "lxc1"}, {Name: "eth0"}}, IPs: []IP{{Interface: &one, Address: "10.0.0.2/32"}}}
	gc = Request{Protocol: Protocol, Command: "GC", CNIVersion: "1.1.0", Network: "lash", Valid: []Attachment{{"c1", "eth0"}}}
	return map[string]Request{"ADD": base, "DEL": del, "CHECK": check, "STATUS": status, "GC": gc}
}

func TestRequestIsReadAsItWasWritten(t *testing.T) {
	for name, req := range requests() {
		data, err := json.Marshal(req)
		if err != nil {
			t.Fatal(err)
		}
		got, problem := ParseRequest(data)
		if problem != nil {
			t.Errorf("%s: %v", name, problem)
			continue
		}
		again, err := json.Marshal(got)
		if err != nil || !bytes.Equal(data, again) {
			t.Errorf("%s: %s became %s (%v)", name, data, again, err)
		}
	}
}

func TestAgentRefusesWhatThePluginWouldNotSend(t *testing.T) {
	for name, c := range map[string]struct {
		request string
		field   string
	}{
		"empty":             {"", "request"},
		"other protocol":    {`{"protocol":2,"command":"ADD","news":true}`, "protocol"},
		"no protocol":       {`{"command":"ADD"}`, "protocol"},
		"unknown field":     {`{"protocol":1,"command":"ADD","x":1}`, "request"},
		"two documents":     {`{"protocol":1,"command":"STATUS","cniVersion":"1.1.0","network":"lash"}{}`, "request"},
		"VERSION":           {`{"protocol":1,"command":"VERSION","cniVersion":"1.1.0","network":"lash"}`, "CNI_COMMAND"},
		"bad container":     {`{"protocol":1,"command":"DEL","cniVersion":"1.1.0","network":"lash","containerID":"a/b","ifname":"eth0"}`, "CNI_CONTAINERID"},
		"bad netns of DEL":  {`{"protocol":1,"command":"DEL","cniVersion":"1.1.0","network":"lash","containerID":"a","ifname":"eth0","netns":"x"}`, "CNI_NETNS"},
		"CHECK without":     {`{"protocol":1,"command":"CHECK","cniVersion":"1.1.0","network":"lash","containerID":"a","ifname":"eth0","netns":"/x"}`, "prevResult"},
		"negative endpoint": {`{"protocol":-1}`, "protocol"},
	} {
		if _, problem := ParseRequest([]byte(c.request)); problem == nil || !strings.Contains(problem.Msg, c.field) {
			t.Errorf("%s: %v, want %q", name, problem, c.field)
		}
	}
}

// FuzzParseRequest: whatever arrives, the parser neither panics nor lets a request through that it would not write
// itself, and an error always has a code and a bounded message.
func FuzzParseRequest(f *testing.F) {
	for _, req := range requests() {
		data, err := json.Marshal(req)
		if err != nil {
			f.Fatal(err)
		}
		f.Add(data)
	}
	f.Add([]byte(`{"protocol":1,"command":"ADD","containerID":"\u0000/../","ifname":"\ud800"}`))
	f.Add([]byte(`{"protocol":1e0,"Command":"DEL","command":null}`))
	f.Add([]byte("\xff\xfe{}"))
	f.Fuzz(func(t *testing.T, data []byte) {
		req, problem := ParseRequest(data)
		if problem != nil {
			if problem.Code == 0 || problem.Msg == "" || len(problem.Msg) > 4096 {
				t.Fatalf("error %+v", problem)
			}
			return
		}
		again, err := json.Marshal(req)
		if err != nil {
			t.Fatal(err)
		}
		if _, problem := ParseRequest(again); problem != nil {
			t.Fatalf("accepted %q, but not what it was read as, %q: %v", data, again, problem)
		}
		if strings.ContainsAny(req.ContainerID, "/\x00") || strings.ContainsAny(req.IfName, "/\x00 ") || len(req.IfName) > 15 {
			t.Fatalf("accepted container %q, device %q", req.ContainerID, req.IfName)
		}
	})
}

// FuzzParseNetConf: the same for what the runtime writes to standard input.
func FuzzParseNetConf(f *testing.F) {
	f.Add([]byte(`{"cniVersion":"1.1.0","name":"lash","type":"lash-cni","mtu":1400}`), "ADD")
	f.Add([]byte(`{"cniVersion":"1.1.0","name":"lash","cni.dev/valid-attachments":[{"containerID":"a","ifname":"b"}]}`), "GC")
	f.Add([]byte(`{"cniVersion":"0.4.0","name":"lash","prevResult":{"ips":[{"address":"10.0.0.2/32","interface":9}]}}`), "CHECK")
	f.Add([]byte("{\"cniVersion\":\n[}"), "DEL")
	f.Fuzz(func(t *testing.T, data []byte, command string) {
		conf, problem := ParseNetConf(data, command)
		if problem == nil && (conf == nil || checkVersion(conf.CNIVersion) != nil) {
			t.Fatalf("accepted %q", data)
		}
		if problem != nil && (problem.Code == 0 || problem.Msg == "") {
			t.Fatalf("error %+v", problem)
		}
	})
}

func TestDeletionsAreQueuedOnce(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "deletions")
	if queued, err := QueuedDeletions(dir); err != nil || len(queued) != 0 {
		t.Errorf("a queue that is not there: %v %v", queued, err)
	}
	d := Deletion{"c0ffee", "eth0"}
	for range 2 {
		if err := d.Queue(dir); err != nil {
			t.Fatal(err)
		}
	}
	for name, content := range map[string]string{"bad.json": "{", "escape.json": `{"containerID":"../x"}`, ".half.json": "{", "note.txt": "x"} {
		if err := os.WriteFile(filepath.Join(dir, name), []byte(content), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	queued, err := QueuedDeletions(dir)
	if len(queued) != 1 || queued[0] != d {
		t.Errorf("queued %v", queued)
	}
	if err == nil || !strings.Contains(err.Error(), "bad.json") || !strings.Contains(err.Error(), "escape.json") || strings.Contains(err.Error(), "note.txt") {
		t.Errorf("error %v", err)
	}
	for range 2 {
		if err := d.Done(dir); err != nil {
			t.Error(err)
		}
	}
	if queued, _ := QueuedDeletions(dir); len(queued) != 0 {
		t.Errorf("still queued: %v", queued)
	}
}
