// SPDX-License-Identifier: Apache-2.0

package cni

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"syscall"
	"time"
)

// errAgentAbsent is wrapped by what Call returns when nobody listens on the socket.
var errAgentAbsent = errors.New("nobody listens on the socket")

// maxAnswer bounds what is read back: a result is a few hundred bytes.
const maxAnswer = 1 << 20

// call sends the request, with the descriptor netns if it is not negative, and waits for the answer for at most timeout
// of silence.
//
// Plain system calls instead of package net: the plugin is executed for each pod, and net is half of its size.
func call(socket string, req *Request, netns int, timeout time.Duration) (*Answer, error) {
	body, err := json.Marshal(req)
	if err != nil {
		return nil, err
	}
	fd, err := syscall.Socket(syscall.AF_UNIX, syscall.SOCK_STREAM|syscall.SOCK_CLOEXEC, 0)
	if err != nil {
		return nil, os.NewSyscallError("socket", err)
	}
	defer syscall.Close(fd)
	limit := syscall.NsecToTimeval(timeout.Nanoseconds())
	for _, option := range []int{syscall.SO_RCVTIMEO, syscall.SO_SNDTIMEO} {
		if err := syscall.SetsockoptTimeval(fd, syscall.SOL_SOCKET, option, &limit); err != nil {
			return nil, os.NewSyscallError("setsockopt", err)
		}
	}
	address := &syscall.SockaddrUnix{Name: socket}
	err = uninterrupted(func() error { return syscall.Connect(fd, address) })
	switch {
	case errors.Is(err, syscall.ENOENT), errors.Is(err, syscall.ECONNREFUSED):
		return nil, fmt.Errorf("%w %s: %w", errAgentAbsent, socket, err)
	case err != nil:
		return nil, fmt.Errorf("connect to %s: %w", socket, err)
	}
	var rights []byte
	if netns >= 0 {
		rights = syscall.UnixRights(netns)
	}
	for len(body) > 0 {
		var n int
		err := uninterrupted(func() (err error) {
			n, err = syscall.SendmsgN(fd, body, rights, nil, syscall.MSG_NOSIGNAL)
			return err
		})
		if err != nil {
			return nil, fmt.Errorf("send to %s: %w", socket, err)
		}
		body, rights = body[n:], nil // the descriptor travels with the first byte
	}
	if err := syscall.Shutdown(fd, syscall.SHUT_WR); err != nil {
		return nil, fmt.Errorf("send to %s: %w", socket, err)
	}
	return readAnswer(fd, socket, timeout)
}

func readAnswer(fd int, socket string, timeout time.Duration) (*Answer, error) {
	var all bytes.Buffer
	buf := make([]byte, 4096)
	for {
		var n int
		err := uninterrupted(func() (err error) {
			n, err = syscall.Read(fd, buf)
			return err
		})
		if errors.Is(err, syscall.EAGAIN) {
			return nil, fmt.Errorf("no answer from %s within %s", socket, timeout)
		}
		if err != nil {
			return nil, fmt.Errorf("receive from %s: %w", socket, err)
		}
		if n == 0 {
			break
		}
		if all.Write(buf[:n]); all.Len() > maxAnswer {
			return nil, fmt.Errorf("receive from %s: answer of more than %d bytes", socket, maxAnswer)
		}
	}
	if all.Len() == 0 {
		return nil, fmt.Errorf("%s was closed without an answer: the agent ended while it worked", socket)
	}
	answer := &Answer{}
	if err := json.Unmarshal(all.Bytes(), answer); err != nil {
		return nil, fmt.Errorf("answer of %s: %s", socket, jsonProblem(all.Bytes(), err))
	}
	if answer.Protocol != Protocol {
		return nil, fmt.Errorf("answer of %s: agent speaks protocol version %d, plugin version %d; restart the agent, it installs its own plugin",
			socket, answer.Protocol, Protocol)
	}
	return answer, nil
}

// uninterrupted repeats a system call that a signal ended: with timeouts set, the kernel does not restart it itself.
func uninterrupted(f func() error) error {
	for {
		if err := f(); !errors.Is(err, syscall.EINTR) {
			return err
		}
	}
}
