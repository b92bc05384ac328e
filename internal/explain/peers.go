// SPDX-License-Identifier: Apache-2.0

package explain

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/netip"
	"slices"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/lash-net/lash/api/agent"
	"github.com/lash-net/lash/internal/model"
)

// PathHop is where agents ask each other, at the port of health probes on the nodes' own addresses.
const PathHop = "/explain"

const (
	hopLimit   = 64 << 10 // bytes of a request
	hopTimeout = 20 * time.Second
	// A port below this one takes root in a node's own network namespace. No pod has one in a node's name: source ports of
	// masqueraded connections begin here.
	privileged = 1024
)

// Remote asks the agents of other nodes over the network.
type Remote struct{ Port uint16 }

// Hop implements Peers.
func (r Remote) Hop(ctx context.Context, node model.Node, hop agent.ExplainHop) (answer agent.ExplainHopAnswer, err error) {
	ctx, cancel := context.WithTimeout(ctx, hopTimeout)
	defer cancel()
	body, err := json.Marshal(hop)
	if err != nil {
		return answer, err
	}
	err = errors.New("it has no address")
	for _, a := range node.Addrs {
		if answer, err = r.ask(ctx, a, body); err == nil || ctx.Err() != nil {
			break
		}
	}
	return answer, err
}

func (r Remote) ask(ctx context.Context, a netip.Addr, body []byte) (answer agent.ExplainHopAnswer, err error) {
	client := http.Client{Transport: &http.Transport{DialContext: dialPrivileged, DisableKeepAlives: true}}
	url := "http://" + netip.AddrPortFrom(a, r.Port).String() + PathHop
	req, err := http.NewRequestWithContext(ctx, http.MethodPost, url, bytes.NewReader(body))
	if err != nil {
		return answer, err
	}
	resp, err := client.Do(req)
	if err != nil {
		return answer, err
	}
	defer resp.Body.Close()
	b, err := io.ReadAll(io.LimitReader(resp.Body, 1<<20))
	if err != nil {
		return answer, err
	}
	if resp.StatusCode != http.StatusOK {
		var said agent.Error
		if json.Unmarshal(b, &said) == nil && said.Error != "" {
			return answer, errors.New(said.Error)
		}
		return answer, fmt.Errorf("%s: %s: is its agent of another version?", url, resp.Status)
	}
	return answer, json.Unmarshal(b, &answer)
}

// dialPrivileged dials from a port that only root may use.
func dialPrivileged(ctx context.Context, network, address string) (c net.Conn, err error) {
	for port := privileged - 1; port >= privileged/2; port-- {
		d := net.Dialer{LocalAddr: &net.TCPAddr{Port: port}, Timeout: 3 * time.Second}
		c, err = d.DialContext(ctx, network, address)
		if !errors.Is(err, unix.EADDRINUSE) && !errors.Is(err, unix.EADDRNOTAVAIL) {
			return c, err
		}
	}
	return nil, err
}

// ServeHTTP answers other nodes' agents. Only they are answered: a node's own address and a privileged port are what
// they have and a pod has not.
func (e *Explainer) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	fail := func(code int, err error) {
		w.WriteHeader(code)
		_ = json.NewEncoder(w).Encode(agent.Error{Error: err.Error()})
	}
	w.Header().Set("Content-Type", "application/json")
	if err := namesOf(e.Tables).mayAsk(r.RemoteAddr); err != nil {
		fail(http.StatusForbidden, err)
		return
	}
	// The first dry run loads programs.
	_ = http.NewResponseController(w).SetWriteDeadline(time.Now().Add(hopTimeout))
	var hop agent.ExplainHop
	if err := json.NewDecoder(http.MaxBytesReader(w, r.Body, hopLimit)).Decode(&hop); err != nil {
		fail(http.StatusBadRequest, fmt.Errorf("hop: %w", err))
		return
	}
	answer, err := e.Hop(r.Context(), hop)
	if err != nil {
		fail(http.StatusUnprocessableEntity, err)
		return
	}
	_ = json.NewEncoder(w).Encode(answer)
}

// mayAsk: the address is that of a root process in the network namespace of a node of the cluster.
func (n names) mayAsk(remote string) error {
	host, port, err := net.SplitHostPort(remote)
	if err != nil {
		return err
	}
	p, err := strconv.Atoi(port)
	if err != nil || p >= privileged {
		return fmt.Errorf("from port %s: agents ask from a port below %d", port, privileged)
	}
	a, err := netip.ParseAddr(strings.Split(host, "%")[0])
	if err != nil {
		return err
	}
	if _, ok := n.node(func(r model.Node) bool { return slices.Contains(r.Addrs, a.Unmap()) }); !ok {
		return fmt.Errorf("from %s: no node of the cluster has this address", a)
	}
	return nil
}
