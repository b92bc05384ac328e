// SPDX-License-Identifier: Apache-2.0

package v2

import (
	"fmt"
	"io"
	"net/http"
	"reflect"

	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/runtime/schema"
	"k8s.io/apimachinery/pkg/watch"
	kjson "sigs.k8s.io/json"
)

// newWatcher reports the events of a watch's body, a sequence of metav1.WatchEvent in JSON, and closes it. Every agent
// reads every CiliumEndpoint of the cluster, and client-go's decoder, made for objects of any kind, takes about three times
// as long (BenchmarkWatch). Here the text is read up to the event's end, and then once more, right into the object.
func newWatcher[Obj any, P named[Obj]](body io.ReadCloser) watch.Interface {
	return watch.NewStreamWatcher(&eventDecoder[Obj, P]{body, kjson.NewDecoderCaseSensitivePreserveInts(body)}, apierrors.NewClientErrorReporter(http.StatusInternalServerError, "GET", "ClientWatchDecoding"))
}

// eventDecoder is a watch.Decoder.
type eventDecoder[Obj any, P named[Obj]] struct {
	body io.ReadCloser
	json kjson.Decoder
}

func (d *eventDecoder[Obj, P]) Close() { d.body.Close() }

// Decode waits for an event. io.EOF: the server has ended the watch.
func (d *eventDecoder[Obj, P]) Decode() (watch.EventType, runtime.Object, error) {
	var e struct {
		Type   eventType[Obj, P] `json:"type"`
		Object runtime.Object    `json:"object"`
	}
	e.Type.object = &e.Object
	if err := d.json.Decode(&e); err != nil {
		return "", nil, err
	}
	typ := e.Type.EventType
	switch typ {
	case watch.Added, watch.Modified, watch.Deleted, watch.Bookmark, watch.Error:
	default:
		return "", nil, fmt.Errorf("got invalid watch event type: %q", typ)
	}
	if e.Object == nil || reflect.ValueOf(e.Object).Elem().IsZero() {
		return "", nil, fmt.Errorf("watch event %s has no object of its type", typ)
	}
	e.Object.GetObjectKind().SetGroupVersionKind(schema.GroupVersionKind{}) // as what is read otherwise: the type says it
	return typ, e.Object, nil
}

// eventType goes before the object, as in metav1.WatchEvent, and says what is decoded: one of the watched, or why there are
// no more of them.
type eventType[Obj any, P named[Obj]] struct {
	watch.EventType
	object *runtime.Object
}

// UnmarshalText implements encoding.TextUnmarshaler.
func (t *eventType[Obj, P]) UnmarshalText(text []byte) error {
	t.EventType = watch.EventType(text)
	if t.EventType == watch.Error {
		*t.object = new(metav1.Status)
	} else {
		*t.object = P(new(Obj))
	}
	return nil
}
