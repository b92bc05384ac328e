// SPDX-License-Identifier: Apache-2.0

package bench

import "github.com/lash-net/lash/internal/datapath"

// withinPod is between two processes of a pod, by its own address.
func withinPod(t *Topology) (Pair, error) {
	c, err := t.lash(native)
	if err != nil {
		return Pair{}, err
	}
	a := c.pods[0]
	return Pair{Client: a.Netns, Server: a.Netns, Server4: a.addr4, Server6: a.addr6}, nil
}

// lashSockmap is the same without packets.
func lashSockmap(t *Topology) (Pair, error) {
	c, err := t.lash(native)
	if err != nil {
		return Pair{}, err
	}
	pair, err := withinPod(t)
	if err != nil {
		return Pair{}, err
	}
	var cookie uint64
	if err := pair.Client.Do(func() error { cookie, err = datapath.NetnsCookie(); return err }); err != nil {
		return Pair{}, err
	}
	if pair.Group, err = t.group("sockmap"); err != nil {
		return Pair{}, err
	}
	if err := c.n.datapath.SetLocalNetns(map[uint64]bool{cookie: true}); err != nil {
		return Pair{}, err
	}
	t.Defer(func() { _ = c.n.datapath.DetachLocal() })
	return pair, c.n.datapath.AttachLocal(pair.Group.Name())
}
