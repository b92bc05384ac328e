// SPDX-License-Identifier: Apache-2.0

package packet

import (
	"testing"

	"github.com/lash-net/lash/bpf"
)

// Steps that change records as time or the agent does.

// later makes every route due for another look.
func later(t *testing.T, p *programs) {
	p.change(t, func(_ *bpf.ConnKey, c *bpf.Conn) {
		c.Orig.Deadline, c.Reply.Deadline = c.Created-1, c.Created-1
	})
}

// unhurried gives routes that no test has made due a quarter of an hour more: an emulated machine may take longer for a few
// steps than the second for which they hold.
func unhurried(t *testing.T, p *programs) {
	p.change(t, func(_ *bpf.ConnKey, c *bpf.Conn) {
		for _, d := range []*bpf.ConnDir{&c.Orig, &c.Reply} {
			if d.Epoch != 0 && int32(d.Deadline-c.Created) >= 0 {
				d.Deadline += 1 << 18
			}
		}
	})
}

// expire lets every record's lifetime end.
func expire(t *testing.T, p *programs) {
	p.change(t, func(_ *bpf.ConnKey, c *bpf.Conn) { c.Expires = c.Created - 2*1000 }) // two seconds ago at the fastest tick
}

// closed wants every record to be closed by RST, or none.
func closed(yes bool) func(*testing.T, *programs) {
	return func(t *testing.T, p *programs) {
		for k, c := range p.conns(t) {
			if (c.State&bpf.StateClosed != 0) != yes {
				t.Errorf("%v: state %#x", k, c.State)
			}
		}
	}
}

func raise(t *testing.T, p *programs) {
	if err := p.dp.Raise("test"); err != nil {
		t.Fatal(err)
	}
}
