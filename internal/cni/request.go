// SPDX-License-Identifier: Apache-2.0

package cni

import (
	"bytes"
	"encoding/json"
	"io"
	"net/netip"
	"slices"
	"strings"
)

// Protocol is the version of the conversation between plugin and agent. It changes when one of them would misread the
// other; an agent names both numbers when it refuses.
const Protocol = 1

// MaxRequest is the longest request the agent reads, in bytes: enough for a GC with thousands of attachments.
const MaxRequest = 4 << 20

// Request is what the plugin sends: one JSON document, its first byte accompanied by the pod's network namespace as a
// file descriptor (SCM_RIGHTS) for ADD and CHECK, followed by the end of the stream.
type Request struct {
	Protocol    int    `json:"protocol"`
	Command     string `json:"command"`
	CNIVersion  string `json:"cniVersion"`
	Network     string `json:"network"`
	ContainerID string `json:"containerID,omitempty"`
	IfName      string `json:"ifname,omitempty"`
	Netns       string `json:"netns,omitempty"` // the path, for the record and the result; never opened by the agent
	Pod         Pod    `json:"pod,omitzero"`
	MTU         int    `json:"mtu,omitempty"`
	RouteMTU    int    `json:"routeMTU,omitempty"`

	PrevResult *PrevResult  `json:"prevResult,omitempty"`       // CHECK
	Valid      []Attachment `json:"validAttachments,omitempty"` // GC
}

// Pod is what CNI_ARGS says about the pod; empty outside Kubernetes.
type Pod struct {
	Namespace string `json:"namespace,omitempty"`
	Name      string `json:"name,omitempty"`
	UID       string `json:"uid,omitempty"`
}

// Answer is what the agent returns. Error is nil on success; Result is the CNI result of an ADD in the request's version.
type Answer struct {
	Protocol int             `json:"protocol"`
	Result   json.RawMessage `json:"result,omitempty"`
	Error    *Error          `json:"error,omitempty"`
}

var agentCommands = []string{"ADD", "DEL", "CHECK", "STATUS", "GC"}

// ParseRequest reads and checks a request. Unknown fields are refused: within one protocol version there are none.
func ParseRequest(data []byte) (*Request, *Error) {
	if len(data) > MaxRequest {
		return nil, Errorf(CodeDecode, "request of more than %d bytes", MaxRequest)
	}
	// The version is read first and alone, so that a plugin of another release is told so and not about a field.
	var version struct {
		Protocol int `json:"protocol"`
	}
	if err := json.Unmarshal(data, &version); err != nil {
		return nil, Errorf(CodeDecode, "request: %s", jsonProblem(data, err)).With("only lash-cni may speak to this socket")
	}
	if version.Protocol != Protocol {
		return nil, Errorf(CodeInternal, "protocol: plugin speaks version %d, agent version %d", version.Protocol, Protocol).
			With("restart the lash agent on this node: it installs the plugin of its own release")
	}
	decoder := json.NewDecoder(bytes.NewReader(data))
	decoder.DisallowUnknownFields()
	req := &Request{}
	if err := decoder.Decode(req); err != nil {
		return nil, Errorf(CodeDecode, "request: %s", jsonProblem(data, err)).With("only lash-cni may speak to this socket")
	}
	if _, err := decoder.Token(); err != io.EOF {
		return nil, Errorf(CodeDecode, "request: more than one document").With("only lash-cni may speak to this socket")
	}
	if err := req.Validate(); err != nil {
		return nil, err
	}
	return req, nil
}

// Validate checks every field that the command uses. Each error names the field, by its name in the CNI specification,
// and the remedy.
func (r *Request) Validate() *Error {
	if err := checkCommand(r.Command); err != nil {
		return err
	}
	if err := checkVersion(r.CNIVersion); err != nil {
		return err
	}
	if err := checkName(CodeInvalidConfig, "name", r.Network); err != nil {
		return err
	}
	if err := checkMTU(CodeInvalidConfig, "mtu", r.MTU); err != nil {
		return err
	}
	if err := checkMTU(CodeInvalidConfig, "route-mtu", r.RouteMTU); err != nil {
		return err
	}
	switch r.Command {
	case "STATUS":
		return nil
	case "GC":
		return checkAttachments(r.Valid)
	}
	if err := checkName(CodeInvalidEnvironment, "CNI_CONTAINERID", r.ContainerID); err != nil {
		return err
	}
	if err := checkIfName(CodeInvalidEnvironment, "CNI_IFNAME", r.IfName); err != nil {
		return err
	}
	if r.Command != "DEL" || r.Netns != "" {
		if err := checkPath(CodeInvalidEnvironment, "CNI_NETNS", r.Netns); err != nil {
			return err
		}
	}
	if err := r.Pod.validate(); err != nil {
		return err
	}
	if r.Command == "CHECK" {
		return r.PrevResult.validate()
	}
	return nil
}

func checkCommand(command string) *Error {
	if command == "" {
		return Errorf(CodeInvalidEnvironment, "CNI_COMMAND is missing").
			With("set it to one of %s or VERSION", strings.Join(agentCommands, ", "))
	}
	if !slices.Contains(agentCommands, command) {
		return Errorf(CodeInvalidEnvironment, "CNI_COMMAND %q is unknown", clip(command)).
			With("set it to one of %s or VERSION", strings.Join(agentCommands, ", "))
	}
	return nil
}

func checkAttachments(attachments []Attachment) *Error {
	for _, a := range attachments {
		if err := checkName(CodeInvalidConfig, "cni.dev/valid-attachments: containerID", a.ContainerID); err != nil {
			return err
		}
		if err := checkIfName(CodeInvalidConfig, "cni.dev/valid-attachments: ifname", a.IfName); err != nil {
			return err
		}
	}
	return nil
}

func (p Pod) validate() *Error {
	for _, f := range []struct{ field, value string }{
		{"CNI_ARGS: K8S_POD_NAMESPACE", p.Namespace},
		{"CNI_ARGS: K8S_POD_NAME", p.Name},
		{"CNI_ARGS: K8S_POD_UID", p.UID},
	} {
		if f.value == "" {
			continue
		}
		if err := checkName(CodeInvalidEnvironment, f.field, f.value); err != nil {
			return err
		}
	}
	if (p.Namespace == "") != (p.Name == "") {
		return Errorf(CodeInvalidEnvironment, "CNI_ARGS: K8S_POD_NAMESPACE is %q and K8S_POD_NAME is %q", p.Namespace, p.Name).
			With("give both or none")
	}
	return nil
}

func (p *PrevResult) validate() *Error {
	remedy := "the runtime passes the result of ADD; one of an older pod helps as little as none: recreate the pod"
	if p == nil {
		return Errorf(CodeInvalidConfig, "prevResult is missing, CHECK compares with it").With("%s", remedy)
	}
	if len(p.IPs) == 0 {
		return Errorf(CodeInvalidConfig, "prevResult: ips is empty").With("%s", remedy)
	}
	for i, ip := range p.IPs {
		if _, err := netip.ParsePrefix(ip.Address); err != nil {
			return Errorf(CodeInvalidConfig, "prevResult: ips[%d].address %q is not an address with a prefix length", i, clip(ip.Address)).With("%s", remedy)
		}
		if n := ip.Interface; n != nil && (*n < 0 || *n >= len(p.Interfaces)) {
			return Errorf(CodeInvalidConfig, "prevResult: ips[%d].interface %d has no entry in interfaces (%d)", i, *n, len(p.Interfaces)).With("%s", remedy)
		}
	}
	return nil
}

// ParseArgs reads CNI_ARGS ("K=V;K=V"). Keys that are not about the pod are tolerated.
func ParseArgs(args string) (Pod, *Error) {
	var pod Pod
	if args == "" {
		return pod, nil
	}
	for pair := range strings.SplitSeq(args, ";") {
		if pair == "" {
			continue
		}
		key, value, ok := strings.Cut(pair, "=")
		if !ok || key == "" {
			return pod, Errorf(CodeInvalidEnvironment, "CNI_ARGS: %q is not KEY=VALUE", clip(pair)).With("separate the pairs with ';'")
		}
		switch key {
		case "K8S_POD_NAMESPACE":
			pod.Namespace = value
		case "K8S_POD_NAME":
			pod.Name = value
		case "K8S_POD_UID":
			pod.UID = value
		}
	}
	return pod, pod.validate()
}
