// SPDX-License-Identifier: Apache-2.0

package state

import (
	"maps"
	"slices"
	"strconv"
	"sync"
	"time"

	"github.com/cilium/statedb"

	"github.com/lash-net/lash/internal/model"
	"github.com/lash-net/lash/internal/reconcile"
)

// Controller is the health of one loop.
type Controller = model.Controller

var controllerByName = byString("name", func(r Controller) string { return r.Name })

// ControllerByName finds the health of a loop.
func ControllerByName(name string) statedb.Query[Controller] { return controllerByName.Query(name) }

func newControllers(db *statedb.DB) (statedb.RWTable[Controller], error) {
	return statedb.NewTableAny(db, "controllers",
		func() []string {
			return []string{"Name", "Rows", "Failing", "LastSuccess", "LastError", "Count", "Message"}
		},
		func(r Controller) []string {
			return []string{r.Name, strconv.Itoa(r.Rows), strconv.Itoa(r.Failing), stamp(r.LastSuccess), stamp(r.LastError),
				strconv.FormatUint(r.Errors, 10), r.Message}
		}, controllerByName)
}

func stamp(nanoseconds int64) string {
	if nanoseconds == 0 {
		return "never"
	}
	return time.Unix(0, nanoseconds).UTC().Format(time.RFC3339)
}

// reportEvery is how often the progress of a loop that is as well as before is written.
const reportEvery = time.Second

// reports are what loops have said of their progress and is not written yet: some run a hundred times a second.
type reports struct {
	mu   sync.Mutex
	late map[string]Controller // nil: nothing is to be written later
}

// Report writes the health of a loop; it is a loop's Report function. A change for the worse or the better is written at
// once, mere progress within a second.
func (t *Tables) Report(h reconcile.Health) {
	c := Controller{Name: h.Name, Rows: h.Rows, Failing: h.Failing, Errors: h.Errors, Message: "no error"}
	if !h.LastSuccess.IsZero() {
		c.LastSuccess = h.LastSuccess.UnixNano()
	}
	if !h.LastError.IsZero() {
		c.LastError = h.LastError.UnixNano()
	}
	if h.Errors > 0 {
		c.Message = h.Message
	}
	r := &t.reports
	r.mu.Lock()
	defer r.mu.Unlock()
	old, _, ok := t.Controllers.Get(t.DB.ReadTxn(), ControllerByName(c.Name))
	progress := ok && old.Failing == c.Failing && old.Errors == c.Errors && old.Message == c.Message && old.LastError == c.LastError
	if !progress || c.LastSuccess-old.LastSuccess >= int64(reportEvery) {
		delete(r.late, c.Name)
		Insert(t.DB, t.Controllers, c)
		return
	}
	if r.late == nil {
		r.late = map[string]Controller{}
		time.AfterFunc(reportEvery, t.writeReports)
	}
	r.late[c.Name] = c
}

func (t *Tables) writeReports() {
	t.reports.mu.Lock()
	defer t.reports.mu.Unlock()
	Insert(t.DB, t.Controllers, slices.Collect(maps.Values(t.reports.late))...)
	t.reports.late = nil
}
