// SPDX-License-Identifier: Apache-2.0

package v2

import (
	"encoding/json"
	"fmt"
	"io"
	"net/http"

	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/runtime/schema"
	"k8s.io/apimachinery/pkg/watch"
	kjson "sigs.k8s.io/json"
)

// newWatcher reports the events of a watch's body, a sequence of metav1.WatchEvent in JSON, and closes it. Every agent
// reads every CiliumEndpoint of the cluster, and client-go's decoder, made for objects of any kind, takes nearly twice as
// long (BenchmarkWatch): it looks for the kind and copies the text before it decodes.
func newWatcher[Obj any, P named[Obj]](body io.ReadCloser) watch.Interface {
	return watch.NewStreamWatcher(&eventDecoder[Obj, P]{body, json.NewDecoder(body)}, apierrors.NewClientErrorReporter(http.StatusInternalServerError, "GET", "ClientWatchDecoding"))
}

// eventDecoder is a watch.Decoder.
type eventDecoder[Obj any, P named[Obj]] struct {
	body io.ReadCloser
	json *json.Decoder
}

func (d *eventDecoder[Obj, P]) Close() { d.body.Close() }

// Decode waits for an event. io.EOF: the server has ended the watch.
func (d *eventDecoder[Obj, P]) Decode() (watch.EventType, runtime.Object, error) {
	var e struct {
		Type   watch.EventType `json:"type"`
		Object payload[Obj, P] `json:"object"`
	}
	e.Object.of = &e.Type
	if err := d.json.Decode(&e); err != nil {
		return "", nil, err
	}
	switch e.Type {
	case watch.Added, watch.Modified, watch.Deleted, watch.Bookmark, watch.Error:
	default:
		return "", nil, fmt.Errorf("got invalid watch event type: %q", e.Type)
	}
	if _, status := e.Object.object.(*metav1.Status); e.Object.object == nil || status != (e.Type == watch.Error) {
		return "", nil, fmt.Errorf("watch event %s has no object of its type", e.Type)
	}
	return e.Type, e.Object.object, nil
}

// payload is an event's object. The type goes before it, as in metav1.WatchEvent, and says whether it is one of the
// watched or why there are no more of them.
type payload[Obj any, P named[Obj]] struct {
	of     *watch.EventType
	object runtime.Object
}

// UnmarshalJSON implements json.Unmarshaler.
func (p *payload[Obj, P]) UnmarshalJSON(text []byte) error {
	if *p.of == watch.Error {
		p.object = new(metav1.Status)
	} else {
		p.object = P(new(Obj))
	}
	if err := kjson.UnmarshalCaseSensitivePreserveInts(text, p.object); err != nil {
		return err
	}
	p.object.GetObjectKind().SetGroupVersionKind(schema.GroupVersionKind{}) // as what is read otherwise: the type says it
	return nil
}
