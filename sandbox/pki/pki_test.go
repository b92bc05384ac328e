// SPDX-License-Identifier: Apache-2.0

package pki

import (
	"crypto/tls"
	"crypto/x509"
	"net/netip"
	"os"
	"strings"
	"testing"
)

func TestLeafIsTrustedForItsNamesOnly(t *testing.T) {
	d := Dir(t.TempDir())
	if err := d.CA("ca"); err != nil {
		t.Fatal(err)
	}
	if err := d.Leaf("srv", "ca", "kube-apiserver", nil, []string{"kubernetes"}, netip.MustParseAddr("10.96.0.1"), netip.MustParseAddr("fd00::1")); err != nil {
		t.Fatal(err)
	}
	pair, err := tls.LoadX509KeyPair(d.Path("srv.crt"), d.Path("srv.key"))
	if err != nil {
		t.Fatal(err)
	}
	ca, err := os.ReadFile(d.Path("ca.crt"))
	if err != nil {
		t.Fatal(err)
	}
	pool := x509.NewCertPool()
	pool.AppendCertsFromPEM(ca)
	leaf, err := x509.ParseCertificate(pair.Certificate[0])
	if err != nil {
		t.Fatal(err)
	}
	for _, name := range []string{"kubernetes", "10.96.0.1", "fd00::1"} {
		if _, err := leaf.Verify(x509.VerifyOptions{Roots: pool, DNSName: name}); err != nil {
			t.Errorf("%s: %v", name, err)
		}
	}
	if _, err := leaf.Verify(x509.VerifyOptions{Roots: pool, DNSName: "10.96.0.2"}); err == nil {
		t.Error("valid for an address it does not name")
	}
}

func TestExistingFilesAreKept(t *testing.T) {
	d := Dir(t.TempDir())
	for range 2 {
		if err := d.CA("ca"); err != nil {
			t.Fatal(err)
		}
		if err := d.KeyPair("sa"); err != nil {
			t.Fatal(err)
		}
	}
	before, _ := os.ReadFile(d.Path("ca.crt"))
	if err := d.CA("ca"); err != nil {
		t.Fatal(err)
	}
	after, _ := os.ReadFile(d.Path("ca.crt"))
	if string(before) != string(after) {
		t.Error("the authority was replaced: every certificate in use would stop working")
	}
}

func TestKubeconfigEmbedsEverything(t *testing.T) {
	d := Dir(t.TempDir())
	if err := d.CA("ca"); err != nil {
		t.Fatal(err)
	}
	if _, err := d.Kubeconfig("lash", "admin", "https://1.2.3.4:6443"); err == nil {
		t.Error("no error for a client without a certificate")
	}
	if err := d.Leaf("admin", "ca", "admin", []string{"system:masters"}, nil); err != nil {
		t.Fatal(err)
	}
	kc, err := d.Kubeconfig("lash", "admin", "https://1.2.3.4:6443")
	if err != nil {
		t.Fatal(err)
	}
	if s := string(kc); !strings.Contains(s, "server: https://1.2.3.4:6443\n") || strings.Contains(s, string(d)) {
		t.Errorf("kubeconfig:\n%s", s)
	}
}
