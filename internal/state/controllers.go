// SPDX-License-Identifier: Apache-2.0

package state

import (
	"strconv"
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

// Report writes the health of a loop; it is a loop's Report function.
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
	Insert(t.DB, t.Controllers, c)
}
