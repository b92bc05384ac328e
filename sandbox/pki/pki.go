// SPDX-License-Identifier: Apache-2.0

// Package pki makes a sandbox's certificates and kubeconfigs: one CA for the cluster, one for the
// API server's front proxy, and the leaves that Kubernetes' components show each other.
package pki

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/base64"
	"encoding/pem"
	"errors"
	"fmt"
	"io/fs"
	"math/big"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"time"
)

const validity = 10 * 365 * 24 * time.Hour

// Dir is a directory of NAME.crt and NAME.key files.
type Dir string

// Path of a file in the directory.
func (d Dir) Path(name string) string { return filepath.Join(string(d), name) }

// CA makes NAME.crt and NAME.key, a self-signed authority, unless they exist.
func (d Dir) CA(name string) error {
	if d.exists(name) {
		return nil
	}
	t := template(name, nil)
	t.IsCA = true
	t.BasicConstraintsValid = true
	t.KeyUsage = x509.KeyUsageDigitalSignature | x509.KeyUsageCertSign | x509.KeyUsageCRLSign
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return err
	}
	return d.sign(name, t, t, key, key)
}

// Leaf makes NAME.crt and NAME.key signed by ca, valid for client and server use, unless they exist.
func (d Dir) Leaf(name, ca, commonName string, groups []string, dnsNames []string, addrs ...netip.Addr) error {
	if d.exists(name) {
		return nil
	}
	caCert, caKey, err := d.load(ca)
	if err != nil {
		return err
	}
	t := template(commonName, groups)
	t.KeyUsage = x509.KeyUsageDigitalSignature | x509.KeyUsageKeyEncipherment
	t.ExtKeyUsage = []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth, x509.ExtKeyUsageServerAuth}
	t.DNSNames = dnsNames
	for _, a := range addrs {
		t.IPAddresses = append(t.IPAddresses, net.IP(a.AsSlice()))
	}
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return err
	}
	return d.sign(name, t, caCert, key, caKey)
}

// KeyPair makes NAME.key and NAME.pub, which sign and check service account tokens.
func (d Dir) KeyPair(name string) error {
	if _, err := os.Stat(d.Path(name + ".pub")); err == nil {
		return nil
	}
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return err
	}
	pub, err := x509.MarshalPKIXPublicKey(&key.PublicKey)
	if err != nil {
		return err
	}
	if err := d.writeKey(name, key); err != nil {
		return err
	}
	return d.write(name+".pub", "PUBLIC KEY", pub, 0o644)
}

// Kubeconfig renders a kubeconfig for the client certificate name against server, with everything
// embedded, so that the file can be copied anywhere.
func (d Dir) Kubeconfig(cluster, name, server string) ([]byte, error) {
	var enc [3]string
	for i, f := range []string{"ca.crt", name + ".crt", name + ".key"} {
		b, err := os.ReadFile(d.Path(f))
		if err != nil {
			return nil, err
		}
		enc[i] = base64.StdEncoding.EncodeToString(b)
	}
	return fmt.Appendf(nil, `apiVersion: v1
kind: Config
clusters:
- name: %[1]s
  cluster:
    server: %[3]s
    certificate-authority-data: %[4]s
users:
- name: %[1]s-%[2]s
  user:
    client-certificate-data: %[5]s
    client-key-data: %[6]s
contexts:
- name: %[1]s
  context: {cluster: %[1]s, user: %[1]s-%[2]s}
current-context: %[1]s
`, cluster, name, server, enc[0], enc[1], enc[2]), nil
}

func template(commonName string, groups []string) *x509.Certificate {
	serial, err := rand.Int(rand.Reader, new(big.Int).Lsh(big.NewInt(1), 120))
	if err != nil {
		panic(err) // crypto/rand does not fail on Linux
	}
	now := time.Now()
	return &x509.Certificate{
		SerialNumber: serial,
		Subject:      pkix.Name{CommonName: commonName, Organization: groups},
		NotBefore:    now.Add(-time.Hour),
		NotAfter:     now.Add(validity),
	}
}

func (d Dir) exists(name string) bool {
	_, err1 := os.Stat(d.Path(name + ".crt"))
	_, err2 := os.Stat(d.Path(name + ".key"))
	return err1 == nil && err2 == nil
}

func (d Dir) load(name string) (*x509.Certificate, *ecdsa.PrivateKey, error) {
	crt, err := os.ReadFile(d.Path(name + ".crt"))
	if err != nil {
		return nil, nil, fmt.Errorf("read authority: %w", err)
	}
	key, err := os.ReadFile(d.Path(name + ".key"))
	if err != nil {
		return nil, nil, fmt.Errorf("read authority's key: %w", err)
	}
	cb, _ := pem.Decode(crt)
	kb, _ := pem.Decode(key)
	if cb == nil || kb == nil {
		return nil, nil, fmt.Errorf("%s: no PEM block", d.Path(name))
	}
	c, err := x509.ParseCertificate(cb.Bytes)
	if err != nil {
		return nil, nil, err
	}
	k, err := x509.ParseECPrivateKey(kb.Bytes)
	return c, k, err
}

func (d Dir) sign(name string, t, parent *x509.Certificate, key, parentKey *ecdsa.PrivateKey) error {
	der, err := x509.CreateCertificate(rand.Reader, t, parent, &key.PublicKey, parentKey)
	if err != nil {
		return fmt.Errorf("certificate %s: %w", name, err)
	}
	if err := d.writeKey(name, key); err != nil {
		return err
	}
	return d.write(name+".crt", "CERTIFICATE", der, 0o644)
}

func (d Dir) writeKey(name string, key *ecdsa.PrivateKey) error {
	der, err := x509.MarshalECPrivateKey(key)
	if err != nil {
		return err
	}
	return d.write(name+".key", "EC PRIVATE KEY", der, 0o600)
}

func (d Dir) write(file, kind string, der []byte, mode fs.FileMode) error {
	if err := os.MkdirAll(string(d), 0o700); err != nil && !errors.Is(err, fs.ErrExist) {
		return err
	}
	return os.WriteFile(d.Path(file), pem.EncodeToMemory(&pem.Block{Type: kind, Bytes: der}), mode)
}
