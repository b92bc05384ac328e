// SPDX-License-Identifier: Apache-2.0

package netdev

import (
	"errors"
	"fmt"
	"io"
	"net"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/lash-net/lash/internal/testutil"
)

// A socket with a cookie that is named is ended, one beside it is not, nor one that is not connected.
func TestDestroySockets(t *testing.T) {
	ns := testutil.Netns(t)
	testutil.In(t, ns, "ip", "link", "set", "lo", "up")
	var problem error
	testutil.Inside(t, ns, func() {
		problem = func() error {
			for _, at := range []string{"127.0.0.1:0", "[::1]:0"} {
				l, err := net.Listen("tcp", at)
				if err != nil {
					return err
				}
				defer l.Close()
				dial := func() (*net.TCPConn, uint64, error) {
					c, err := net.Dial("tcp", l.Addr().String())
					if err != nil {
						return nil, 0, err
					}
					raw, err := c.(*net.TCPConn).SyscallConn()
					if err != nil {
						return nil, 0, err
					}
					var cookie uint64
					var cerr error
					if err := raw.Control(func(fd uintptr) { cookie, cerr = unix.GetsockoptUint64(int(fd), unix.SOL_SOCKET, unix.SO_COOKIE) }); err != nil {
						return nil, 0, err
					}
					return c.(*net.TCPConn), cookie, cerr
				}
				doomed, cookie, err := dial()
				if err != nil {
					return err
				}
				defer doomed.Close()
				other, _, err := dial()
				if err != nil {
					return err
				}
				defer other.Close()
				n, err := DestroySockets(map[uint64]bool{cookie: true, 1 << 60: true})
				if err != nil || n != 1 {
					return fmt.Errorf("%s: %d destroyed, %v", at, n, err)
				}
				doomed.SetReadDeadline(time.Now().Add(2 * time.Second))
				if _, err := doomed.Read(make([]byte, 1)); !errors.Is(err, unix.ECONNABORTED) {
					return fmt.Errorf("%s: the socket says %v", at, err)
				}
				other.SetReadDeadline(time.Now().Add(50 * time.Millisecond))
				if _, err := other.Read(make([]byte, 1)); err == nil || errors.Is(err, io.EOF) || errors.Is(err, unix.ECONNABORTED) {
					return fmt.Errorf("%s: the other socket says %v", at, err)
				}
				if n, err := DestroySockets(map[uint64]bool{cookie: true}); err != nil || n != 0 {
					return fmt.Errorf("%s: a second time %d, %v", at, n, err)
				}
			}
			return nil
		}()
	})
	if errors.Is(problem, ErrNoSockDestroy) {
		t.Skip(problem)
	}
	if problem != nil {
		t.Fatal(problem)
	}
}
