// SPDX-License-Identifier: Apache-2.0

package state

import (
	"testing"
	"testing/synctest"
	"time"

	"github.com/lash-net/lash/internal/reconcile"
)

func TestReportsOfProgressAreFewAndOfTroublePrompt(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		tables := newTables(t)
		start := tables.Controllers.Revision(tables.DB.ReadTxn())
		expect := func(writes int, rows int, message string) {
			t.Helper()
			txn := tables.DB.ReadTxn()
			c, _, _ := tables.Controllers.Get(txn, ControllerByName("a"))
			if got := int(tables.Controllers.Revision(txn) - start); got != writes || c.Rows != rows || c.Message != message {
				t.Errorf("%d writes, last %+v, want %d, rows %d, %q", got, c, writes, rows, message)
			}
		}
		h := reconcile.Health{Name: "a"}
		for i := range 100 {
			h.Rows, h.LastSuccess = i, time.Now()
			tables.Report(h)
			time.Sleep(time.Millisecond)
		}
		expect(1, 0, "no error")
		time.Sleep(2 * reportEvery)
		expect(2, 99, "no error")
		h.Rows, h.LastSuccess = 100, time.Now()
		tables.Report(h)
		expect(3, 100, "no error")
		h.Rows = 101
		tables.Report(h)
		h.Failing, h.Errors, h.Message, h.LastError = 1, 1, "no", time.Now()
		tables.Report(h)
		expect(4, 101, "no")
		h.Failing, h.Errors, h.LastSuccess = 0, 0, time.Now()
		tables.Report(h)
		expect(5, 101, "no error")
		time.Sleep(2 * reportEvery)
		expect(5, 101, "no error")
	})
}
