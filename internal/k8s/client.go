// SPDX-License-Identifier: Apache-2.0

package k8s

import (
	"context"
	"encoding/json"
	"fmt"
	"net"
	"time"

	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/runtime/schema"
	"k8s.io/apimachinery/pkg/runtime/serializer"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/apimachinery/pkg/version"
	"k8s.io/client-go/rest"
	"k8s.io/client-go/tools/clientcmd"

	v2 "github.com/lash-net/lash/api/v2"
)

// Client speaks to the API server about the few kinds the agent needs; a full client set would register every kind
// there is and cost memory on every node.
type Client struct {
	Host      string // the API server's URL
	core      rest.Interface
	discovery rest.Interface
	cilium    *v2.Clients
	params    runtime.ParameterCodec
}

// Connect prepares a client without sending anything: of the kubeconfig file, or, if that is empty, of the pod's service
// account.
func Connect(kubeconfig, userAgent string) (*Client, error) {
	var cfg *rest.Config
	var err error
	if kubeconfig != "" {
		cfg, err = clientcmd.BuildConfigFromFlags("", kubeconfig)
	} else {
		cfg, err = rest.InClusterConfig()
	}
	if err != nil {
		return nil, fmt.Errorf("find the API server: %w", err)
	}
	cfg.UserAgent = userAgent
	return NewClient(cfg)
}

// NewClient prepares a client of a configuration.
func NewClient(cfg *rest.Config) (*Client, error) {
	scheme := runtime.NewScheme()
	if err := corev1.AddToScheme(scheme); err != nil {
		return nil, err
	}
	if err := discoveryv1.AddToScheme(scheme); err != nil {
		return nil, err
	}
	metav1.AddToGroupVersion(scheme, schema.GroupVersion{Version: "v1"})
	codecs := serializer.NewCodecFactory(scheme)
	cfg = rest.CopyConfig(cfg)
	cfg.QPS, cfg.Burst = 50, 100
	if cfg.Dial == nil {
		cfg.Dial = (&net.Dialer{Timeout: 5 * time.Second, KeepAlive: 15 * time.Second}).DialContext
	}
	c := &Client{Host: cfg.Host, params: runtime.NewParameterCodec(scheme)}
	client := func(gv schema.GroupVersion, path string) (rest.Interface, error) {
		g := rest.CopyConfig(cfg)
		g.GroupVersion, g.APIPath = &gv, path
		g.NegotiatedSerializer = codecs.WithoutConversion()
		g.ContentType = runtime.ContentTypeProtobuf
		g.AcceptContentTypes = runtime.ContentTypeProtobuf + "," + runtime.ContentTypeJSON
		r, err := rest.RESTClientFor(g)
		if err != nil {
			return nil, fmt.Errorf("client for %s: %w", gv, err)
		}
		return r, nil
	}
	var err error
	if c.core, err = client(corev1.SchemeGroupVersion, "/api"); err != nil {
		return nil, err
	}
	if c.discovery, err = client(discoveryv1.SchemeGroupVersion, "/apis"); err != nil {
		return nil, err
	}
	// A node whose pods all come at once writes an identity and a CiliumEndpoint for each.
	writes := rest.CopyConfig(cfg)
	writes.QPS, writes.Burst = 200, 400
	if c.cilium, err = v2.New(writes); err != nil {
		return nil, err
	}
	return c, nil
}

// Version asks the API server for its version: "1.34 (v1.34.4) [linux/amd64]".
func (c *Client) Version(ctx context.Context) (string, error) {
	body, err := c.core.Get().AbsPath("/version").Do(ctx).Raw()
	if err != nil {
		return "", err
	}
	var v version.Info
	if err := json.Unmarshal(body, &v); err != nil {
		return "", fmt.Errorf("version of the API server: %w", err)
	}
	return fmt.Sprintf("%s.%s (%s) [%s]", v.Major, v.Minor, v.GitVersion, v.Platform), nil
}

// NodeState is what the agent says about its Node object once pods can run.
type NodeState struct {
	RemoveTaint string // key; empty: none
	Reason      string // of condition NetworkUnavailable=False
	Message     string
}

// MarkNodeReady removes the taint from the node and sets its condition NetworkUnavailable to False.
func (c *Client) MarkNodeReady(ctx context.Context, name string, s NodeState) error {
	var node corev1.Node
	if err := c.core.Get().Resource("nodes").Name(name).Do(ctx).Into(&node); err != nil {
		return fmt.Errorf("get node %s: %w", name, err)
	}
	keep := []corev1.Taint{}
	for _, t := range node.Spec.Taints {
		if t.Key != s.RemoveTaint {
			keep = append(keep, t)
		}
	}
	if len(keep) < len(node.Spec.Taints) {
		// The resource version makes this fail, and be tried again, if someone else changed the taints meanwhile.
		patch, err := json.Marshal(map[string]any{
			"metadata": map[string]any{"resourceVersion": node.ResourceVersion},
			"spec":     map[string]any{"taints": keep},
		})
		if err != nil {
			return err
		}
		if err := c.core.Patch(types.MergePatchType).Resource("nodes").Name(name).Body(patch).Do(ctx).Error(); err != nil {
			return fmt.Errorf("remove taint %s from node %s: %w", s.RemoveTaint, name, err)
		}
	}
	for _, cond := range node.Status.Conditions {
		if cond.Type == corev1.NodeNetworkUnavailable && cond.Status == corev1.ConditionFalse && cond.Reason == s.Reason {
			return nil
		}
	}
	now := metav1.Now()
	patch, err := json.Marshal(map[string]any{"status": map[string]any{"conditions": []corev1.NodeCondition{{
		Type: corev1.NodeNetworkUnavailable, Status: corev1.ConditionFalse, Reason: s.Reason, Message: s.Message,
		LastTransitionTime: now, LastHeartbeatTime: now,
	}}}})
	if err != nil {
		return err
	}
	if err := c.core.Patch(types.StrategicMergePatchType).Resource("nodes").Name(name).SubResource("status").Body(patch).Do(ctx).Error(); err != nil {
		return fmt.Errorf("set condition NetworkUnavailable of node %s: %w", name, err)
	}
	return nil
}

// PublishedNode is what a node tells the others by its CiliumNode.
type PublishedNode struct {
	Name      string
	OwnerUID  string           // of its Node, so that the CiliumNode goes with it
	Addresses []v2.NodeAddress // replaced as a whole
	Health    v2.HealthAddressing
	PodCIDRs  []string          // nil: the operator owns them
	Labels    map[string]string // added
}

// PublishNode creates or updates the CiliumNode.
func (c *Client) PublishNode(ctx context.Context, n PublishedNode) error {
	have, err := c.cilium.Nodes.Get(ctx, n.Name)
	create := apierrors.IsNotFound(err)
	if err != nil && !create {
		return fmt.Errorf("get CiliumNode %s: %w", n.Name, err)
	}
	if create {
		have = &v2.CiliumNode{ObjectMeta: metav1.ObjectMeta{Name: n.Name}}
	}
	want := have.DeepCopy()
	if n.OwnerUID != "" {
		want.OwnerReferences = []metav1.OwnerReference{{APIVersion: "v1", Kind: "Node", Name: n.Name, UID: types.UID(n.OwnerUID)}}
	}
	want.Spec.Addresses, want.Spec.Health = n.Addresses, n.Health
	if n.PodCIDRs != nil {
		want.Spec.IPAM.PodCIDRs = n.PodCIDRs
	}
	if create {
		if _, err := c.cilium.Nodes.Create(ctx, want); err != nil {
			return fmt.Errorf("create CiliumNode %s: %w", n.Name, err)
		}
		return nil
	}
	if _, err := c.cilium.Nodes.Update(ctx, want); err != nil {
		return fmt.Errorf("update CiliumNode %s: %w", n.Name, err)
	}
	return nil
}

// AnnounceTunnel sets v2.TunnelAnnotation of the CiliumNode, or removes it if tunnel is empty.
func (c *Client) AnnounceTunnel(ctx context.Context, name, tunnel string) error {
	var value any
	if tunnel != "" {
		value = tunnel
	}
	patch, err := json.Marshal(map[string]any{"metadata": map[string]any{"annotations": map[string]any{v2.TunnelAnnotation: value}}})
	if err != nil {
		return err
	}
	if _, err := c.cilium.Nodes.Patch(ctx, name, types.MergePatchType, patch); err != nil {
		return fmt.Errorf("annotation %s of CiliumNode %s: %w", v2.TunnelAnnotation, name, err)
	}
	return nil
}

// DeletePod deletes the pod if it is still the one with uid. A pod that is gone is no error.
func (c *Client) DeletePod(ctx context.Context, namespace, name, uid string) error {
	u := types.UID(uid)
	opts := &metav1.DeleteOptions{Preconditions: &metav1.Preconditions{UID: &u}}
	err := c.core.Delete().Namespace(namespace).Resource("pods").Name(name).Body(opts).Do(ctx).Error()
	if apierrors.IsNotFound(err) || apierrors.IsConflict(err) {
		return nil
	}
	return err
}
