// SPDX-License-Identifier: Apache-2.0

package cli

import (
	"context"
	"fmt"
	"io"
	"strings"
	"time"

	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
)

// waitReady returns when agents and operator are up to date and ready, printing a line whenever that changes.
func (k *cluster) waitReady(ctx context.Context, namespace string, limit time.Duration, out io.Writer) error {
	ctx, cancel := context.WithTimeout(ctx, limit)
	defer cancel()
	begin, last := time.Now(), ""
	var problem string
	for {
		progress, done, err := k.progress(ctx, namespace)
		if err != nil {
			problem = err.Error()
		} else {
			problem = ""
			if progress != last {
				fmt.Fprintf(out, "%5.1fs       %s\n", time.Since(begin).Seconds(), progress)
				last = progress
			}
			if done {
				return nil
			}
		}
		select {
		case <-ctx.Done():
			if problem == "" {
				problem = k.whyNot(context.WithoutCancel(ctx), namespace)
			}
			return fmt.Errorf("not ready after %s: %s\n%s", limit, last, problem)
		case <-time.After(500 * time.Millisecond):
		}
	}
}

// progress describes how far agents and operator are.
func (k *cluster) progress(ctx context.Context, namespace string) (text string, done bool, err error) {
	ds, err := k.clientset.AppsV1().DaemonSets(namespace).Get(ctx, "lash", metav1.GetOptions{})
	if apierrors.IsNotFound(err) {
		return "", false, fmt.Errorf("no DaemonSet lash in namespace %s: 'lash install' installs Lash", namespace)
	}
	if err != nil {
		return "", false, err
	}
	dep, err := k.clientset.AppsV1().Deployments(namespace).Get(ctx, "lash-operator", metav1.GetOptions{})
	if err != nil {
		return "", false, err
	}
	s, want := ds.Status, int32(1)
	if dep.Spec.Replicas != nil {
		want = *dep.Spec.Replicas
	}
	agents := min(s.NumberReady, s.UpdatedNumberScheduled)
	operators := min(dep.Status.ReadyReplicas, dep.Status.UpdatedReplicas)
	text = fmt.Sprintf("agents %d/%d ready, operator %d/%d ready", agents, s.DesiredNumberScheduled, operators, want)
	done = ds.Generation == s.ObservedGeneration && s.DesiredNumberScheduled > 0 && agents == s.DesiredNumberScheduled &&
		dep.Generation == dep.Status.ObservedGeneration && operators >= want
	return text, done, nil
}

// whyNot says what the pods that are not ready wait for, one line a pod.
func (k *cluster) whyNot(ctx context.Context, namespace string) string {
	ctx, cancel := context.WithTimeout(ctx, 10*time.Second)
	defer cancel()
	var lines []string
	for _, selector := range []string{agentSelector, "name=lash-operator"} {
		pods, err := k.clientset.CoreV1().Pods(namespace).List(ctx, metav1.ListOptions{LabelSelector: selector})
		if err != nil {
			return err.Error()
		}
		for i := range pods.Items {
			if p := &pods.Items[i]; !ready(p) {
				lines = append(lines, fmt.Sprintf("  %s on %s: %s", p.Name, orDash(p.Spec.NodeName), podProblem(p)))
			}
		}
	}
	return strings.Join(lines, "\n")
}

func podProblem(p *corev1.Pod) string {
	for _, c := range p.Status.ContainerStatuses {
		switch {
		case c.State.Waiting != nil:
			text := c.State.Waiting.Reason + " " + c.State.Waiting.Message
			if t := c.LastTerminationState.Terminated; t != nil && t.Message != "" {
				text += ": " + strings.TrimSpace(t.Message)
			}
			return text
		case c.State.Terminated != nil:
			return c.State.Terminated.Reason + " " + c.State.Terminated.Message
		}
	}
	for _, c := range p.Status.Conditions {
		if c.Status == corev1.ConditionFalse && c.Message != "" {
			return c.Message
		}
	}
	return string(p.Status.Phase)
}
