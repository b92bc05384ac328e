// SPDX-License-Identifier: Apache-2.0

package sysdump

import (
	"encoding/json"
	"strings"
	"testing"
)

func TestNamesOfSecrets(t *testing.T) {
	for name, want := range map[string]bool{
		"DB_PASSWORD": true, "password": true, "apiKey": true, "APIKey": true, "api-key": true, "X_API_KEY": true, "authToken": true, "token": true, "AWS_SECRET_ACCESS_KEY": true,
		"privateKey": true, "client-key-data": true, "ipsec-key": true, "--token": true, "secret": true, "Authorization": true, "clientSecret": true, "encryptionKey": true, ".dockerconfigjson": true,
		"key": false, "name": false, "secretName": false, "secretKeyRef": false, "tokenExpirationSeconds": false, "imagePullSecrets": true, "automountServiceAccountToken": true,
		"topologyKey": false, "keys": false, "agent-not-ready-taint-key": false, "--tls-private-key-file": false, "authorization-mode": false, "monkey": false, "KEYBOARD": false, "identity": false, "": false,
	} {
		if got := sensitive(name); got != want {
			t.Errorf("%q: %v, want %v", name, got, want)
		}
	}
}

func TestSecretsAreRedactedAndNothingElse(t *testing.T) {
	const pod = `{"kind": "Pod", "metadata": {"name": "p", "managedFields": [{"x": "s3cret-0"}],
	  "annotations": {"kubectl.kubernetes.io/last-applied-configuration": "{\"env\": \"s3cret-1\"}", "vault-token": "s3cret-2", "note": "curl -H 'Authorization: Bearer s3cret-3333'"}},
	 "spec": {"automountServiceAccountToken": true, "imagePullSecrets": [{"name": "keep-1"}], "tolerations": [{"key": "keep-2", "value": "keep-3"}],
	  "volumes": [{"secret": {"secretName": "keep-4"}}],
	  "containers": [{"name": "c", "args": ["--token=s3cret-4", "--token", "s3cret-5", "--token", "--keep-5", "keep-6", "--password-file=/keep-7"],
	   "env": [{"name": "DB_PASSWORD", "value": "s3cret-6"}, {"name": "DB_PASSWORD", "valueFrom": {"secretKeyRef": {"name": "keep-8", "key": "keep-9"}}},
	    {"name": "URL", "value": "postgres://u:s3cret-7@db/x?y=keep-10"}, {"name": "LEVEL", "value": "keep-11"}]}]},
	 "data": {"api-key": "s3cret-8", "config": "user: keep-12\npassword: s3cret-9\n", "tokens": ["s3cret-10"], "number": 12345678901234567890}}`
	got := string(redact([]byte(pod)))
	if strings.Contains(got, "s3cret") {
		t.Errorf("secrets are left in\n%s", got)
	}
	for i := 1; i <= 12; i++ {
		if want := "keep-" + string(rune('0'+i%10)); i < 10 && !strings.Contains(got, want) {
			t.Errorf("%s is gone from\n%s", want, got)
		}
	}
	for _, want := range []string{"keep-10", "keep-11", "keep-12", "12345678901234567890", `"automountServiceAccountToken": true`} {
		if !strings.Contains(got, want) {
			t.Errorf("%s is gone from\n%s", want, got)
		}
	}
	if !json.Valid([]byte(got)) {
		t.Errorf("no JSON any more:\n%s", got)
	}
	if again := string(redact([]byte(got))); again != got {
		t.Errorf("the second time changes something:\n%s\n%s", got, again)
	}
}

func TestSecretsInText(t *testing.T) {
	for _, text := range []string{
		"-----BEGIN EC PRIVATE KEY-----\ns3cret\n-----END EC PRIVATE KEY-----", "-----BEGIN PRIVATE KEY-----\ns3cret", "token eyJhbGciOiJS3cret.eyJpc3MiOiJrdWs3cret.s3cret",
		"Authorization: Basic dXNlcjpzM2s3cret==", `level=info msg="x" token=s3cret`, `{"access_key": "s3cret", `, "https://user:s3cret@host/", "AKIAS3CRETS3CRETS3CR",
		"MY_SECRET=s3cret", "password: 's3 s3cret'", "api-key:s3cret", "ghp_s3crets3crets3crets3cret",
	} {
		if got := redactText(text); strings.Contains(strings.ToLower(got), "s3cret") {
			t.Errorf("%q becomes %q", text, got)
		}
	}
	for _, text := range []string{
		"10.0.1.7/32   k8s:app=x   172.18.0.12", "tokens are read from /var/run/secrets", `node=n1 msg="secret of the pod"`, "fd00::1:2", "--agent-not-ready-taint-key='node.cilium.io/agent-not-ready'",
		"http://172.18.0.1:4240/hello", "basic auth", "a.b.c",
	} {
		if got := redactText(text); got != text {
			t.Errorf("%q becomes %q", text, got)
		}
	}
}
