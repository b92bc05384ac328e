// SPDX-License-Identifier: Apache-2.0

package netdev

import (
	"encoding/binary"
	"errors"
	"fmt"

	"github.com/vishvananda/netlink/nl"
	"golang.org/x/sys/unix"
)

// Layout of sock_diag(7): inet_diag_msg begins with four bytes and the socket's identity, of which the last eight are
// its cookie; inet_diag_req_v2 has the identity behind eight bytes.
const (
	diagIDLen  = 48
	diagMsgID  = 4
	diagReqID  = 8
	diagCookie = diagMsgID + diagIDLen - 8
)

// connected are the states, as bits, in which a socket has a peer: for TCP those between SYN_SENT and LAST_ACK without
// TIME_WAIT, for UDP ESTABLISHED, which is what connect makes it.
var connected = map[uint8]uint32{
	unix.IPPROTO_TCP: 1<<unix.BPF_TCP_ESTABLISHED | 1<<unix.BPF_TCP_SYN_SENT | 1<<unix.BPF_TCP_FIN_WAIT1 | 1<<unix.BPF_TCP_FIN_WAIT2 |
		1<<unix.BPF_TCP_CLOSE_WAIT | 1<<unix.BPF_TCP_LAST_ACK | 1<<unix.BPF_TCP_CLOSING,
	unix.IPPROTO_UDP: 1 << unix.BPF_TCP_ESTABLISHED,
}

// DestroySockets ends the connected sockets of the calling thread's network namespace that have one of the cookies: their
// owners get ECONNABORTED. It returns how many there were; ErrNoSockDestroy if the kernel cannot.
func DestroySockets(cookies map[uint64]bool) (n int, err error) {
	for _, family := range []uint8{unix.AF_INET, unix.AF_INET6} {
		for protocol, states := range connected {
			ids, err := socketIDs(family, protocol, states, cookies)
			if err != nil {
				return n, err
			}
			for _, id := range ids {
				req := nl.NewNetlinkRequest(nl.SOCK_DESTROY, unix.NLM_F_ACK)
				req.AddData(diagRequest(family, protocol, 0, id))
				_, err := req.Execute(unix.NETLINK_INET_DIAG, 0)
				switch {
				case err == nil:
					n++
				case errors.Is(err, unix.EOPNOTSUPP):
					return n, ErrNoSockDestroy
				case !errors.Is(err, unix.ENOENT): // it has ended by itself
					return n, fmt.Errorf("destroy a socket: %w", err)
				}
			}
		}
	}
	return n, nil
}

// ErrNoSockDestroy: the kernel was built without CONFIG_INET_DIAG_DESTROY.
var ErrNoSockDestroy = errors.New("this kernel cannot destroy sockets (CONFIG_INET_DIAG_DESTROY): clients of a backend that is gone find out by their own timeouts")

func socketIDs(family, protocol uint8, states uint32, cookies map[uint64]bool) (ids [][]byte, err error) {
	req := nl.NewNetlinkRequest(nl.SOCK_DIAG_BY_FAMILY, unix.NLM_F_DUMP)
	req.AddData(diagRequest(family, protocol, states, nil))
	err = req.ExecuteIter(unix.NETLINK_INET_DIAG, nl.SOCK_DIAG_BY_FAMILY, func(msg []byte) bool {
		if len(msg) >= diagMsgID+diagIDLen && cookies[binary.NativeEndian.Uint64(msg[diagCookie:])] {
			ids = append(ids, append([]byte(nil), msg[diagMsgID:diagMsgID+diagIDLen]...))
		}
		return true
	})
	if errors.Is(err, unix.ENOENT) || errors.Is(err, unix.EPROTONOSUPPORT) || errors.Is(err, unix.EAFNOSUPPORT) { // a family or protocol that the kernel lacks
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("list sockets: %w", err)
	}
	return ids, nil
}

type diagReq []byte

// Len and Serialize implement nl.NetlinkRequestData.
func (r diagReq) Len() int          { return len(r) }
func (r diagReq) Serialize() []byte { return r }

func diagRequest(family, protocol uint8, states uint32, id []byte) diagReq {
	b := make([]byte, diagReqID+diagIDLen)
	b[0], b[1] = family, protocol
	binary.NativeEndian.PutUint32(b[4:], states)
	copy(b[diagReqID:], id)
	return b
}
