// SPDX-License-Identifier: Apache-2.0

// Command lash-operator does the work a cluster needs done once; see package operator.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"log/slog"
	"os"
	"os/signal"
	"syscall"

	"k8s.io/client-go/rest"
	"k8s.io/client-go/tools/clientcmd"
	"k8s.io/klog/v2"

	"github.com/lash-net/lash/internal/config"
	"github.com/lash-net/lash/internal/operator"
	"github.com/lash-net/lash/internal/version"
)

func main() {
	if len(os.Args) == 2 && (os.Args[1] == "version" || os.Args[1] == "--version") {
		fmt.Println("lash-operator", version.Long())
		return
	}
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	if err := run(ctx, os.Args[1:]); errors.Is(err, flag.ErrHelp) {
		fmt.Print(config.Usage("lash-operator"))
	} else if err != nil {
		fmt.Fprintln(os.Stderr, "lash-operator:", err)
		os.Exit(1)
	}
}

func run(ctx context.Context, args []string) error {
	c, err := config.Load("", args)
	if err != nil {
		return err
	}
	level := slog.LevelInfo
	if c.Debug {
		level = slog.LevelDebug
	}
	log := slog.New(slog.NewTextHandler(os.Stderr, &slog.HandlerOptions{Level: level}))
	klog.SetSlogLogger(log)
	log.Info("starting", "version", version.Long(), "ipam", c.IPAM)
	for _, note := range c.Notes() {
		log.Warn("configuration", "note", note)
	}

	restConfig, err := restConfig(c.K8sKubeConfigPath)
	if err != nil {
		return err
	}
	host, err := os.Hostname()
	if err != nil {
		return err
	}
	identity := os.Getenv("POD_NAME") // the host's name is shared when the pod uses the host's network
	if identity == "" {
		identity = fmt.Sprintf("%s-%d", host, os.Getpid())
	}
	namespace := os.Getenv("POD_NAMESPACE")
	if namespace == "" {
		namespace = "kube-system"
	}
	return operator.New(c, log, restConfig, namespace, identity).Run(ctx)
}

func restConfig(kubeconfig string) (*rest.Config, error) {
	if kubeconfig != "" {
		return clientcmd.BuildConfigFromFlags("", kubeconfig)
	}
	c, err := rest.InClusterConfig()
	if err != nil {
		return nil, fmt.Errorf("find the API server: %w; outside of a pod set k8s-kubeconfig-path", err)
	}
	return c, nil
}
