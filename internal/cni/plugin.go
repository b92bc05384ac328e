// SPDX-License-Identifier: Apache-2.0

package cni

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"syscall"
	"time"
)

// Silence of the agent after which the plugin gives up. Kubelet gives a pod sandbox four minutes and tries again.
const (
	changeTimeout = 30 * time.Second
	statusTimeout = 5 * time.Second
)

// lookAt is the remedy of everything that means "no agent".
const lookAt = `look at "kubectl -n kube-system get pods -l k8s-app=lash -o wide" and ` +
	`"kubectl -n kube-system logs -l k8s-app=lash -c lash-agent"; the runtime tries again by itself`

// Plugin is one execution of the CNI plugin: its environment and its streams.
type Plugin struct {
	Getenv func(string) string
	Stdin  io.Reader
	Stdout io.Writer
	Stderr io.Writer
}

// Run does what CNI_COMMAND says and returns the exit status. Results and errors go to standard output, as the
// specification wants it.
func (p Plugin) Run() int {
	command := p.Getenv("CNI_COMMAND")
	if command == "" {
		fmt.Fprintf(p.Stderr, "lash-cni: the CNI plugin of Lash; CNI versions %v. A container runtime calls it with CNI_COMMAND set.\n", SupportedVersions)
	}
	version, output, problem := p.run(command)
	if problem != nil {
		if version == "" {
			version = LatestVersion
		}
		output, _ = json.Marshal(struct { // strings and numbers only: cannot fail
			CNIVersion string `json:"cniVersion"`
			*Error
		}{version, problem})
	}
	if len(output) > 0 {
		if _, err := p.Stdout.Write(append(output, '\n')); err != nil {
			fmt.Fprintf(p.Stderr, "lash-cni: write the result: %v\n", err)
			return 1
		}
	}
	if problem != nil {
		return 1
	}
	return 0
}

// run returns the version that answers are to be written in, if it is known, and the output or an error.
func (p Plugin) run(command string) (version string, output []byte, _ *Error) {
	if command != "VERSION" {
		if err := checkCommand(command); err != nil {
			return "", nil, err
		}
	}
	stdin, err := io.ReadAll(io.LimitReader(p.Stdin, MaxRequest))
	if err != nil {
		return "", nil, Errorf(CodeIO, "read the network configuration from standard input: %v", err)
	}
	if command == "VERSION" {
		return LatestVersion, versionOutput(), nil
	}
	conf, problem := ParseNetConf(stdin, command)
	if conf != nil && checkVersion(conf.CNIVersion) == nil {
		version = conf.CNIVersion
	}
	if problem != nil {
		return version, nil, problem
	}
	req, problem := p.request(command, conf)
	if problem != nil {
		return version, nil, problem
	}
	output, problem = dispatch(req, conf)
	return version, output, problem
}

func versionOutput() []byte {
	out, _ := json.Marshal(struct { // strings only: cannot fail
		CNIVersion        string   `json:"cniVersion"`
		SupportedVersions []string `json:"supportedVersions"`
	}{LatestVersion, SupportedVersions})
	return out
}

func (p Plugin) request(command string, conf *NetConf) (*Request, *Error) {
	req := &Request{
		Protocol: Protocol, Command: command, CNIVersion: conf.CNIVersion, Network: conf.Name,
		MTU: conf.MTU, RouteMTU: conf.RouteMTU,
	}
	switch command {
	case "STATUS":
		return req, nil
	case "GC":
		if conf.ValidAttachments == nil && conf.ValidAttachmentsOld == nil {
			return nil, Errorf(CodeInvalidConfig, "cni.dev/valid-attachments is missing").
				With("GC removes what is not in this list; pass an empty list to remove all")
		}
		for _, list := range []*[]Attachment{conf.ValidAttachments, conf.ValidAttachmentsOld} {
			if list != nil {
				req.Valid = append(req.Valid, *list...)
			}
		}
		return req, req.Validate()
	}
	pod, problem := ParseArgs(p.Getenv("CNI_ARGS"))
	if problem != nil {
		return nil, problem
	}
	req.ContainerID, req.IfName = p.Getenv("CNI_CONTAINERID"), p.Getenv("CNI_IFNAME")
	req.Netns, req.Pod = p.Getenv("CNI_NETNS"), pod
	if command == "CHECK" {
		req.PrevResult = conf.PrevResult
	}
	return req, req.Validate()
}

func dispatch(req *Request, conf *NetConf) ([]byte, *Error) {
	socket, timeout, netns := conf.Socket, changeTimeout, -1
	if socket == "" {
		socket = DefaultSocket
	}
	switch req.Command {
	case "STATUS":
		timeout = statusTimeout
	case "DEL":
		return nil, del(req, conf, socket)
	case "ADD", "CHECK":
		fd, problem := openNetns(req.Netns)
		if problem != nil {
			return nil, problem
		}
		defer syscall.Close(fd)
		netns = fd
	}
	answer, err := call(socket, req, netns, timeout)
	if err != nil {
		return nil, unreachable(req.Command, err)
	}
	return answer.Result, answer.Error
}

func openNetns(path string) (int, *Error) {
	var fd int
	err := uninterrupted(func() (err error) {
		fd, err = syscall.Open(path, syscall.O_RDONLY|syscall.O_CLOEXEC, 0)
		return err
	})
	if err != nil {
		return -1, Errorf(CodeInvalidEnvironment, "CNI_NETNS: open %s: %v", clip(path), err).
			With("the runtime makes the pod's network namespace before it calls the plugin; look at its log")
	}
	return fd, nil
}

// del removes the attachment, or queues the removal while no agent runs. It needs no namespace: the pod's may be gone.
func del(req *Request, conf *NetConf, socket string) *Error {
	answer, err := call(socket, req, -1, changeTimeout)
	if err == nil {
		return answer.Error
	}
	if !errors.Is(err, errAgentAbsent) {
		return unreachable(req.Command, err)
	}
	dir := conf.Deletions
	if dir == "" {
		dir = DefaultDeletions
	}
	deletion := Deletion{ContainerID: req.ContainerID, IfName: req.IfName}
	if err := deletion.Queue(dir); err != nil {
		return Errorf(CodeTryAgainLater, "the lash agent on this node is not running, and the deletion cannot be queued: %v", err).With("%s", lookAt)
	}
	// An agent that started in between has read the queue already; see Deletion.
	answer, err = call(socket, req, -1, changeTimeout)
	if err != nil {
		return nil // queued
	}
	if answer.Error != nil {
		return answer.Error
	}
	if err := deletion.Done(dir); err != nil {
		fmt.Fprintf(os.Stderr, "lash-cni: take the deletion off the queue: %v\n", err)
	}
	return nil
}

// unreachable words the failure of a call: what was tried, what happened, where to look.
func unreachable(command string, err error) *Error {
	code := CodeTryAgainLater
	if command == "STATUS" {
		code = CodeNotAvailable
	}
	if errors.Is(err, errAgentAbsent) {
		return Errorf(code, "the lash agent on this node is not running: %v", err).With("%s", lookAt)
	}
	return Errorf(code, "the lash agent on this node does not answer: %v", err).With("%s", lookAt)
}
