// SPDX-License-Identifier: Apache-2.0

package main

import (
	"io"
	"net/http/httptest"
	"strings"
	"testing"
)

func TestHTTPAnswersNameAndClient(t *testing.T) {
	s := httptest.NewServer(handler("me"))
	defer s.Close()
	for path, want := range map[string]string{"/hostname": "me", "/clientip": "127.0.0.1:", "/echo?msg=hi": "hi", "/healthz": "ok"} {
		r, err := s.Client().Get(s.URL + path)
		if err != nil {
			t.Fatal(err)
		}
		b, err := io.ReadAll(r.Body)
		r.Body.Close()
		if err != nil || !strings.HasPrefix(string(b), want) {
			t.Errorf("%s: %q %v, want %q", path, b, err, want)
		}
	}
}
