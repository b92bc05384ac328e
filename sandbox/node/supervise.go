// SPDX-License-Identifier: Apache-2.0

package node

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"os"
	"os/exec"
	"os/signal"
	"sync"
	"syscall"
	"time"
)

const (
	nodePath      = "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
	restartPause  = time.Second
	apiServerWait = 60 * time.Second // kubelet itself retries registration with long pauses; afterwards it starts regardless
)

// children hands the exit status of each child to who started it; process 1 reaps for everybody, so
// nobody else may wait.
type children struct {
	mu      sync.Mutex
	waiting map[int]chan syscall.WaitStatus
}

func (s Spec) supervise(log *slog.Logger) error {
	c := &children{waiting: map[int]chan syscall.WaitStatus{}}
	sigs := make(chan os.Signal, 16)
	signal.Notify(sigs, syscall.SIGCHLD, syscall.SIGTERM, syscall.SIGINT)
	go s.daemons(c, log)
	for sig := range sigs {
		if sig != syscall.SIGCHLD {
			return fmt.Errorf("ended by %s", sig)
		}
		c.reap()
	}
	return nil
}

func (s Spec) daemons(c *children, log *slog.Logger) {
	go c.keep("containerd", s.containerd(), log)
	waitFor(30*time.Second, func() bool {
		conn, err := net.Dial("unix", "/run/containerd/containerd.sock")
		if err == nil {
			conn.Close()
		}
		return err == nil
	})
	waitFor(apiServerWait, apiReady(s.APIServer))
	go c.keep("kubelet", s.kubelet(), log)
	if s.Proxy != "none" {
		go c.keep("kube-proxy", s.kubeProxy(), log)
	}
}

// keep runs a daemon again whenever it ends.
func (c *children) keep(name string, argv []string, log *slog.Logger) {
	for {
		status, err := c.run(name, argv)
		log.Warn("daemon ended", "daemon", name, "status", status, "error", err)
		time.Sleep(restartPause)
	}
}

func (c *children) run(name string, argv []string) (syscall.WaitStatus, error) {
	path, err := exec.LookPath(argv[0])
	if err != nil {
		return 0, err
	}
	out, err := os.OpenFile("/var/log/"+name+".log", os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o644)
	if err != nil {
		return 0, err
	}
	defer out.Close()
	null, err := os.Open(os.DevNull)
	if err != nil {
		return 0, err
	}
	defer null.Close()
	done := make(chan syscall.WaitStatus, 1)
	c.mu.Lock()
	p, err := os.StartProcess(path, argv, &os.ProcAttr{Env: []string{nodePath, "HOME=/root"}, Dir: "/", Files: []*os.File{null, out, out}, Sys: &syscall.SysProcAttr{Setsid: true}})
	if err == nil {
		c.waiting[p.Pid] = done
	}
	c.mu.Unlock()
	if err != nil {
		return 0, err
	}
	return <-done, nil
}

func (c *children) reap() {
	c.mu.Lock() // a child is registered before it can be reaped
	defer c.mu.Unlock()
	for {
		var ws syscall.WaitStatus
		pid, err := syscall.Wait4(-1, &ws, syscall.WNOHANG, nil)
		if err == syscall.EINTR {
			continue
		}
		if err != nil || pid <= 0 {
			return
		}
		if ch, ok := c.waiting[pid]; ok {
			ch <- ws
			delete(c.waiting, pid)
		}
	}
}

func waitFor(limit time.Duration, ok func() bool) {
	deadline := time.Now().Add(limit)
	for !ok() && time.Now().Before(deadline) {
		time.Sleep(50 * time.Millisecond)
	}
}

// apiReady asks the API server whether it is ready; anonymous clients may.
func apiReady(server string) func() bool {
	pool := x509.NewCertPool()
	if ca, err := os.ReadFile("/etc/kubernetes/ca.crt"); err == nil {
		pool.AppendCertsFromPEM(ca)
	}
	client := &http.Client{Timeout: 2 * time.Second, Transport: &http.Transport{TLSClientConfig: &tls.Config{RootCAs: pool, MinVersion: tls.VersionTLS12}}}
	return func() bool {
		req, err := http.NewRequestWithContext(context.Background(), http.MethodGet, server+"/readyz", nil)
		if err != nil {
			return false
		}
		r, err := client.Do(req)
		if err != nil {
			return false
		}
		r.Body.Close()
		return r.StatusCode == http.StatusOK
	}
}
