// SPDX-License-Identifier: Apache-2.0

package endpoint

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"
	"sync"
	"syscall"
	"time"

	"github.com/lash-net/lash/internal/cni"
	"github.com/lash-net/lash/internal/model"
)

const (
	readTimeout    = 5 * time.Second  // for the request to arrive
	requestTimeout = 25 * time.Second // for all of its work; the plugin waits 30
)

// Run opens the socket, restores the endpoints and serves the plugin until ctx ends and the last request is answered.
// Requests that come while it restores wait.
func (e *Endpoints) Run(ctx context.Context) error {
	listener, err := listen(e.cfg.Socket)
	if err != nil {
		return err
	}
	var requests sync.WaitGroup
	defer requests.Wait()
	ctx, cancel := context.WithCancel(ctx)
	defer cancel() // those that wait for the restoring are answered when it fails
	stop := context.AfterFunc(ctx, func() { listener.Close() })
	defer stop()
	defer listener.Close()

	accepted := make(chan error, 1)
	requests.Go(func() { accepted <- e.accept(ctx, listener, &requests) })
	if err := e.restore(ctx); err != nil {
		return err
	}
	close(e.restored)
	if err := <-accepted; ctx.Err() == nil {
		return fmt.Errorf("serve %s: %w", e.cfg.Socket, err)
	}
	return nil
}

func listen(socket string) (*net.UnixListener, error) {
	if err := os.MkdirAll(filepath.Dir(socket), 0o755); err != nil {
		return nil, fmt.Errorf("listen on %s: %w", socket, err)
	}
	// What an agent that was killed has left; two agents on one node are excluded by the DaemonSet.
	if err := os.Remove(socket); err != nil && !errors.Is(err, os.ErrNotExist) {
		return nil, fmt.Errorf("listen on %s: %w", socket, err)
	}
	listener, err := net.ListenUnix("unix", &net.UnixAddr{Name: socket, Net: "unix"})
	if err != nil {
		return nil, fmt.Errorf("listen on %s: %w", socket, err)
	}
	if err := os.Chmod(socket, 0o600); err != nil {
		listener.Close()
		return nil, fmt.Errorf("listen on %s: %w", socket, err)
	}
	return listener, nil
}

func (e *Endpoints) accept(ctx context.Context, listener *net.UnixListener, requests *sync.WaitGroup) error {
	for {
		conn, err := listener.AcceptUnix()
		if errors.Is(err, syscall.EMFILE) || errors.Is(err, syscall.ENFILE) || errors.Is(err, syscall.ECONNABORTED) {
			e.cfg.Log.Warn("connection of the plugin refused", "error", err)
			select {
			case <-ctx.Done():
			case <-time.After(50 * time.Millisecond): // until a request has ended and its files are closed
			}
			continue
		}
		if err != nil {
			return err
		}
		requests.Go(func() {
			defer conn.Close()
			// A request that has begun is finished, also while the agent is told to end.
			work, cancel := context.WithTimeout(context.WithoutCancel(ctx), requestTimeout)
			defer cancel()
			e.serve(work, ctx, conn)
		})
	}
}

func (e *Endpoints) serve(ctx, agent context.Context, conn *net.UnixConn) {
	answer := cni.Answer{Protocol: cni.Protocol}
	answer.Result, answer.Error = e.answer(ctx, agent, conn)
	if answer.Error != nil {
		e.cfg.Log.Warn("CNI request failed", "code", answer.Error.Code, "error", answer.Error)
	}
	data, err := json.Marshal(answer)
	if err == nil {
		err = conn.SetWriteDeadline(time.Now().Add(readTimeout))
	}
	if err == nil {
		_, err = conn.Write(data)
	}
	if err != nil { // the plugin is gone; the runtime follows with a DEL
		e.cfg.Log.Warn("CNI answer not delivered", "error", err)
	}
}

func (e *Endpoints) answer(ctx, agent context.Context, conn *net.UnixConn) (json.RawMessage, *cni.Error) {
	data, netns, err := receive(conn)
	if netns != nil {
		defer netns.Close()
	}
	if err != nil {
		return nil, cni.Errorf(cni.CodeIO, "receive the request: %v", err)
	}
	req, problem := cni.ParseRequest(data)
	if problem != nil {
		return nil, problem
	}
	if (req.Command == "ADD" || req.Command == "CHECK") && netns == nil {
		return nil, cni.Errorf(cni.CodeInvalidEnvironment, "CNI_NETNS: the request comes without the namespace's descriptor").
			With("only lash-cni may speak to this socket")
	}
	if req.Command != "STATUS" {
		select {
		case <-e.restored:
		case <-agent.Done():
			return nil, cni.Errorf(cni.CodeTryAgainLater, "the lash agent on this node is ending").With("the runtime tries again by itself")
		case <-ctx.Done():
			return nil, cni.Errorf(cni.CodeTryAgainLater, "the lash agent on this node is restoring its endpoints").With("the runtime tries again by itself")
		}
	}
	result, err := e.dispatch(ctx, req, netns)
	return result, asError(err)
}

func (e *Endpoints) dispatch(ctx context.Context, req *cni.Request, netns *os.File) (json.RawMessage, error) {
	switch req.Command {
	case "ADD":
		ep, err := e.Add(ctx, req, netns)
		if err != nil {
			return nil, err
		}
		return attached(ep, req.Netns).Render(req.CNIVersion)
	case "DEL":
		return nil, e.Delete(ctx, req.ContainerID, req.IfName)
	case "CHECK":
		return nil, e.Check(ctx, req, netns)
	case "GC":
		return nil, e.GC(ctx, req.Valid)
	default: // STATUS: Validate lets no other through
		if err := e.Status(); err != nil {
			return nil, cni.Errorf(cni.CodeNotAvailable, "the node cannot take pods yet: %v", err)
		}
		return nil, nil
	}
}

func attached(ep model.Endpoint, netns string) cni.Attached {
	return cni.Attached{
		HostIfName: ep.IfName, HostMAC: ep.NodeMAC.String(), IfName: ep.ContainerIfName, MAC: ep.MAC.String(), Sandbox: netns,
		MTU: ep.Network.MTU, RouteMTU: ep.Network.RouteMTU,
		IPv4: ep.IPv4, IPv6: ep.IPv6, Router4: ep.Network.Router4, Router6: ep.Network.Router6,
	}
}

func asError(err error) *cni.Error {
	var known *cni.Error
	switch {
	case err == nil:
		return nil
	case errors.As(err, &known):
		return known
	case errors.Is(err, context.DeadlineExceeded):
		return cni.Errorf(cni.CodeTryAgainLater, "%v", err)
	}
	return cni.Errorf(cni.CodeInternal, "%v", err)
}

// receive reads to the end of the stream. The descriptor comes with the first bytes; further ones are closed.
func receive(conn *net.UnixConn) (data []byte, netns *os.File, err error) {
	if err := conn.SetReadDeadline(time.Now().Add(readTimeout)); err != nil {
		return nil, nil, err
	}
	buf := make([]byte, 4096)
	oob := make([]byte, syscall.CmsgSpace(4*8))
	n, oobn, _, _, err := conn.ReadMsgUnix(buf, oob)
	if oobn > 0 {
		netns = firstDescriptor(oob[:oobn])
	}
	if err == io.EOF {
		return nil, netns, io.ErrUnexpectedEOF
	}
	if err != nil {
		return nil, netns, err
	}
	// One byte more than allowed, so that what is too long is seen to be.
	rest, err := io.ReadAll(io.LimitReader(conn, int64(cni.MaxRequest-n+1)))
	return append(buf[:n], rest...), netns, err
}

func firstDescriptor(oob []byte) *os.File {
	messages, err := syscall.ParseSocketControlMessage(oob)
	if err != nil {
		return nil
	}
	var first *os.File
	for _, m := range messages {
		descriptors, err := syscall.ParseUnixRights(&m)
		if err != nil {
			continue // another kind of message
		}
		for _, fd := range descriptors {
			if first == nil {
				first = os.NewFile(uintptr(fd), "netns")
				continue
			}
			syscall.Close(fd)
		}
	}
	return first
}
