// SPDX-License-Identifier: Apache-2.0

package cli

import (
	"context"
	"errors"
	"fmt"
	"io"
	"path"
	"slices"
	"strings"
	"time"

	"github.com/spf13/cobra"
	"helm.sh/helm/v3/pkg/action"
	"helm.sh/helm/v3/pkg/storage/driver"
	corev1 "k8s.io/api/core/v1"
	apiextensionsclient "k8s.io/apiextensions-apiserver/pkg/client/clientset/clientset/typed/apiextensions/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime/schema"
	"k8s.io/client-go/dynamic"

	"github.com/lash-net/lash/api/crd"
)

// cleanupLabel marks the pods that clean nodes.
const cleanupLabel = "lash.io/cleanup"

func (a *app) uninstallCommand() *cobra.Command {
	var waitFor time.Duration
	var keepNodes bool
	cmd := &cobra.Command{
		Use:     "uninstall",
		Short:   "Remove Lash from the cluster and from its nodes",
		GroupID: "cluster",
		Args:    cobra.NoArgs,
		Long: `Remove the release, then everything of Lash on each node: programs, maps, devices, routes, the CNI configuration and
plugin. Each node is checked, and named if something is left. Pods keep running but have no network until another one is
installed and they are restarted. Network policies of the cilium.io kinds, and their definitions, are kept if there are any.`,
		Example: "  lash uninstall\n  lash uninstall --context test",
		RunE: func(cmd *cobra.Command, _ []string) error {
			return a.uninstall(cmd.Context(), waitFor, keepNodes)
		},
	}
	cmd.Flags().DurationVar(&waitFor, "wait-duration", 3*time.Minute, "how long to wait for the nodes")
	cmd.Flags().BoolVar(&keepNodes, "keep-nodes", false, "leave the nodes as they are: packets are forwarded on, without an agent")
	return cmd
}

func (a *app) uninstall(ctx context.Context, waitFor time.Duration, keepNodes bool) error {
	k, err := a.cluster()
	if err != nil {
		return err
	}
	helm, err := k.helm(a.namespace)
	if err != nil {
		return err
	}
	// What the cleaning pods need must be read before it is gone.
	template, err := k.cleanupTemplate(ctx, a.namespace)
	if err != nil {
		return err
	}

	u := action.NewUninstall(helm)
	u.Wait, u.Timeout, u.IgnoreNotFound = true, waitFor, false
	_, err = u.Run(releaseName)
	switch {
	case errors.Is(err, driver.ErrReleaseNotFound):
		if template == nil {
			return fmt.Errorf("Lash is not installed in namespace %s", a.namespace)
		}
	case err != nil:
		return fmt.Errorf("uninstall the release: %w", err)
	default:
		fmt.Fprintf(a.Err, "removed      release %s\n", releaseName)
	}
	if template != nil && !keepNodes {
		if err := k.cleanNodes(ctx, template, waitFor, a.Err); err != nil {
			return err
		}
	}
	return k.removeObjects(ctx, a.namespace, a.Err)
}

// cleanupTemplate makes the pod that cleans a node out of the agent's, so that it has the same image and sees the same
// directories; nil if there is no agent.
func (k *cluster) cleanupTemplate(ctx context.Context, namespace string) (*corev1.Pod, error) {
	ds, err := k.clientset.AppsV1().DaemonSets(namespace).Get(ctx, "lash", metav1.GetOptions{})
	if apierrors.IsNotFound(err) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	spec := *ds.Spec.Template.Spec.DeepCopy()
	c := spec.Containers[0]
	c.Name, c.Command = "cleanup", []string{"/usr/bin/lash-agent"}
	c.Args = []string{"cleanup"}
	// The agent's directory is to be removed, and a mount point cannot be: its parent is mounted instead.
	const parent = "/host-run"
	for i, v := range spec.Volumes {
		if v.Name == "run" && v.HostPath != nil {
			base := path.Base(v.HostPath.Path)
			spec.Volumes[i].HostPath = &corev1.HostPathVolumeSource{Path: path.Dir(v.HostPath.Path)}
			c.Args = append(c.Args, "--socket-path="+path.Join(parent, base, "lash.sock"),
				"--cni-socket-path="+path.Join(parent, base, "cni.sock"), "--state-dir="+path.Join(parent, base, "state"))
		}
	}
	for i, m := range c.VolumeMounts {
		if m.Name == "run" {
			c.VolumeMounts[i].MountPath = parent
		}
	}
	c.StartupProbe, c.LivenessProbe, c.ReadinessProbe = nil, nil, nil
	// The ConfigMap goes with the release; the rest is where the agent had it.
	c.VolumeMounts = slices.DeleteFunc(c.VolumeMounts, func(m corev1.VolumeMount) bool { return m.Name == "config" })
	spec.Volumes = slices.DeleteFunc(spec.Volumes, func(v corev1.Volume) bool { return v.Name == "config" })
	spec.Containers, spec.InitContainers = []corev1.Container{c}, nil
	spec.RestartPolicy = corev1.RestartPolicyNever
	spec.ServiceAccountName, spec.DeprecatedServiceAccount = "", ""
	no := false
	spec.AutomountServiceAccountToken = &no
	return &corev1.Pod{
		ObjectMeta: metav1.ObjectMeta{Namespace: namespace, Labels: map[string]string{cleanupLabel: "true"}},
		Spec:       spec,
	}, nil
}

// cleanNodes runs the cleaning pod on every node and reports the nodes on which it failed or never ran.
func (k *cluster) cleanNodes(ctx context.Context, template *corev1.Pod, waitFor time.Duration, out io.Writer) error {
	pods := k.clientset.CoreV1().Pods(template.Namespace)
	nodes, err := k.clientset.CoreV1().Nodes().List(ctx, metav1.ListOptions{})
	if err != nil {
		return fmt.Errorf("list nodes: %w", err)
	}
	remove := func(ctx context.Context) error {
		zero := int64(0)
		return pods.DeleteCollection(ctx, metav1.DeleteOptions{GracePeriodSeconds: &zero}, metav1.ListOptions{LabelSelector: cleanupLabel})
	}
	if err := remove(ctx); err != nil {
		return fmt.Errorf("remove cleaning pods of an earlier run: %w", err)
	}
	defer remove(context.WithoutCancel(ctx))

	waiting := map[string]string{} // pod -> node
	for _, n := range nodes.Items {
		p := template.DeepCopy()
		p.GenerateName, p.Spec.NodeName = "lash-cleanup-", n.Name
		created, err := pods.Create(ctx, p, metav1.CreateOptions{})
		if err != nil {
			return fmt.Errorf("clean node %s: %w", n.Name, err)
		}
		waiting[created.Name] = n.Name
	}

	ctx, cancel := context.WithTimeout(ctx, waitFor)
	defer cancel()
	var errs []error
	for len(waiting) > 0 {
		list, err := pods.List(ctx, metav1.ListOptions{LabelSelector: cleanupLabel})
		if err == nil {
			for i := range list.Items {
				p := &list.Items[i]
				node, ok := waiting[p.Name]
				if !ok || p.Status.Phase != corev1.PodSucceeded && p.Status.Phase != corev1.PodFailed {
					continue
				}
				delete(waiting, p.Name)
				log, _ := pods.GetLogs(p.Name, &corev1.PodLogOptions{}).DoRaw(ctx)
				if p.Status.Phase == corev1.PodFailed {
					errs = append(errs, fmt.Errorf("node %s is not clean: %s", node, orDash(strings.TrimSpace(string(log)))))
					continue
				}
				fmt.Fprintf(out, "clean        node %s\n", node)
			}
		}
		if len(waiting) == 0 {
			break
		}
		select {
		case <-ctx.Done():
			for _, node := range waiting {
				errs = append(errs, fmt.Errorf("node %s was not cleaned within %s: is it running? Run '/usr/bin/lash-agent cleanup' of the image there", node, waitFor))
			}
			return errors.Join(errs...)
		case <-time.After(300 * time.Millisecond):
		}
	}
	return errors.Join(errs...)
}

// removeObjects removes what the release does not contain: the lease, CiliumNodes and the definitions that were installed by
// Lash and hold nothing of the user's.
func (k *cluster) removeObjects(ctx context.Context, namespace string, out io.Writer) error {
	var errs []error
	note := func(err error, what string) {
		if err != nil && !apierrors.IsNotFound(err) {
			errs = append(errs, fmt.Errorf("remove %s: %w", what, err))
		}
	}
	note(k.clientset.CoordinationV1().Leases(namespace).Delete(ctx, "lash-operator-resource-lock", metav1.DeleteOptions{}), "the operator's lease")

	definitions, err := apiextensionsclient.NewForConfig(k.rest)
	if err != nil {
		return err
	}
	objects, err := dynamic.NewForConfig(k.rest)
	if err != nil {
		return err
	}
	list, err := definitions.CustomResourceDefinitions().List(ctx, metav1.ListOptions{LabelSelector: crd.ManagedByLabel + "=" + crd.ManagedBy})
	if err != nil {
		return fmt.Errorf("list definitions: %w", err)
	}
	for _, d := range list.Items {
		if strings.HasSuffix(d.Spec.Names.Kind, "NetworkPolicy") {
			left, err := objects.Resource(schema.GroupVersionResource{Group: d.Spec.Group, Version: "v2", Resource: d.Spec.Names.Plural}).List(ctx, metav1.ListOptions{Limit: 1})
			if err != nil || len(left.Items) > 0 {
				fmt.Fprintf(out, "kept         %s: there are objects of yours\n", d.Name)
				continue
			}
		}
		note(definitions.CustomResourceDefinitions().Delete(ctx, d.Name, metav1.DeleteOptions{}), "definition "+d.Name)
	}
	return errors.Join(errs...)
}
