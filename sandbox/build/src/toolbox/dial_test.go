// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"errors"
	"os"
	"testing"
	"time"
)

func TestProbePings(t *testing.T) {
	for network, addr := range map[string]string{"icmp4": "127.0.0.1", "icmp6": "::1"} {
		conn, err := dial(context.Background(), network, addr)
		if errors.Is(err, os.ErrPermission) {
			t.Skip("needs raw sockets: run as root")
		}
		if err != nil {
			t.Fatal(err)
		}
		defer conn.Close()
		if r := run(context.Background(), conn, message{}, time.Millisecond, 50*time.Millisecond); r.Sent == 0 || r.Lost != 0 || r.Error != "" {
			t.Errorf("%s: got %+v", network, r)
		}
	}
}
