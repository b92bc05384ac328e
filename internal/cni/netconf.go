// SPDX-License-Identifier: Apache-2.0

package cni

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
)

// DefaultSocket is where the agent listens for the plugin.
const DefaultSocket = "/var/run/lash/cni.sock"

// NetConf is the network configuration that the runtime passes on standard input. Keys that are not here are
// tolerated: runtimes and later versions add some.
type NetConf struct {
	CNIVersion string `json:"cniVersion"`
	Name       string `json:"name"`
	Type       string `json:"type"`
	// Socket replaces DefaultSocket, Deletions replaces DefaultDeletions: for tests and for second instances.
	Socket    string `json:"socket"`
	Deletions string `json:"deletions"`
	// MTU of the pod's device and of its routes; 0 leaves the choice to the agent.
	MTU      int `json:"mtu"`
	RouteMTU int `json:"route-mtu"`

	PrevResult *PrevResult `json:"prevResult"`
	// The specification names the first key, some runtimes send the second, too.
	ValidAttachments    *[]Attachment `json:"cni.dev/valid-attachments"`
	ValidAttachmentsOld *[]Attachment `json:"cni.dev/attachments"`
}

// Attachment names one device of one container.
type Attachment struct {
	ContainerID string `json:"containerID"`
	IfName      string `json:"ifname"`
}

// PrevResult is what CHECK compares with: the part of an earlier result that this plugin made. The keys are the same in
// all supported versions.
type PrevResult struct {
	Interfaces []Interface `json:"interfaces,omitempty"`
	IPs        []IP        `json:"ips,omitempty"`
}

// ParseNetConf reads and checks a network configuration for a command.
func ParseNetConf(data []byte, command string) (*NetConf, *Error) {
	if len(bytes.TrimSpace(data)) == 0 {
		return nil, Errorf(CodeDecode, "standard input has no network configuration").
			With("the runtime passes it; by hand: lash-cni < 05-lash.conf")
	}
	conf := &NetConf{}
	if err := json.Unmarshal(data, conf); err != nil {
		return nil, Errorf(CodeDecode, "network configuration: %s", jsonProblem(data, err)).
			With("correct the file in /etc/cni/net.d, or remove it to have the agent write it again")
	}
	if err := checkVersion(conf.CNIVersion); err != nil {
		return conf, err
	}
	if first, ok := since[command]; ok && versionBefore(conf.CNIVersion, first) {
		return conf, Errorf(CodeIncompatibleVersion, "cniVersion %s has no command %s", conf.CNIVersion, command).
			With("write %s or later into the network configuration", first)
	}
	if command == "VERSION" {
		return conf, nil
	}
	if err := checkName(CodeInvalidConfig, "name", conf.Name); err != nil {
		return conf, err
	}
	for field, path := range map[string]string{"socket": conf.Socket, "deletions": conf.Deletions} {
		if path == "" {
			continue
		}
		if err := checkPath(CodeInvalidConfig, field, path); err != nil {
			return conf, err.With("give an absolute path, or leave the key out")
		}
	}
	if err := checkMTU(CodeInvalidConfig, "mtu", conf.MTU); err != nil {
		return conf, err
	}
	if err := checkMTU(CodeInvalidConfig, "route-mtu", conf.RouteMTU); err != nil {
		return conf, err
	}
	if command == "ADD" && conf.PrevResult != nil {
		return conf, Errorf(CodeInvalidConfig, "prevResult: another plugin has made a device before this one").
			With("put lash-cni first in the plugins of the network configuration list")
	}
	return conf, nil
}

// jsonProblem says where in the text decoding failed, and at which field.
func jsonProblem(data []byte, err error) string {
	var syntax *json.SyntaxError
	var kind *json.UnmarshalTypeError
	switch {
	case errors.As(err, &kind):
		return fmt.Sprintf("field %q is a JSON %s where %s is wanted", clip(kind.Field), kind.Value, kind.Type)
	case errors.As(err, &syntax):
		line := 1 + bytes.Count(data[:min(int(syntax.Offset), len(data))], []byte("\n"))
		return fmt.Sprintf("line %d: %s", line, syntax.Error())
	}
	return err.Error()
}
