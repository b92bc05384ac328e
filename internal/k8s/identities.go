// SPDX-License-Identifier: Apache-2.0

package k8s

import (
	"context"
	"fmt"
	"strconv"

	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"

	v2 "github.com/lash-net/lash/api/v2"
	"github.com/lash-net/lash/internal/model"
	"github.com/lash-net/lash/internal/state"
)

// CreateIdentity makes the number mean the labels, or reports that it is taken.
func (c *Client) CreateIdentity(ctx context.Context, id model.Identity, labels model.Labels) (taken bool, err error) {
	name, security := identityName(id), labels.Map()
	obj := &v2.CiliumIdentity{ObjectMeta: metav1.ObjectMeta{Name: name}, SecurityLabels: security}
	if ns := security[model.LabelSource+model.LabelNamespace]; ns != "" {
		obj.Labels = map[string]string{model.LabelNamespace: ns}
	}
	switch _, err := c.cilium.Identities.Create(ctx, obj); {
	case apierrors.IsAlreadyExists(err):
		return true, nil
	case err != nil:
		return false, fmt.Errorf("create CiliumIdentity %s: %w", name, err)
	}
	return false, nil
}

// IdentityLabels asks what the number means. That it means nothing any more is an error: the next attempt creates it.
func (c *Client) IdentityLabels(ctx context.Context, id model.Identity) (model.Labels, error) {
	have, err := c.cilium.Identities.Get(ctx, identityName(id))
	if err != nil {
		return "", fmt.Errorf("get CiliumIdentity %d: %w", uint32(id), err)
	}
	return model.LabelsOf(have.SecurityLabels), nil
}

// UseIdentity takes the operator's mark from an identity. One that is gone is no error.
func (c *Client) UseIdentity(ctx context.Context, id model.Identity) error {
	patch := fmt.Appendf(nil, `{"metadata":{"annotations":{%q:null}}}`, v2.UnusedAnnotation)
	_, err := c.cilium.Identities.Patch(ctx, identityName(id), types.MergePatchType, patch)
	if err != nil && !apierrors.IsNotFound(err) {
		return fmt.Errorf("keep CiliumIdentity %d: %w", uint32(id), err)
	}
	return nil
}

func identityName(id model.Identity) string { return strconv.FormatUint(uint64(id), 10) }

// convertIdentity leaves out the labels of an object that cannot be an identity, so that nobody has it.
func convertIdentity(o *v2.CiliumIdentity) (state.Identity, problems) {
	var p problems
	row := state.Identity{Created: o.CreationTimestamp.Unix()}
	_, row.Unused = o.Annotations[v2.UnusedAnnotation]
	id, err := strconv.ParseUint(o.Name, 10, 32)
	if err != nil || identityName(model.Identity(id)) != o.Name {
		p.add("metadata.name", "%q is no number", o.Name)
		return row, p
	}
	row.ID = model.Identity(id)
	if row.ID < model.IdentityMin || row.ID > model.IdentityMax {
		p.add("metadata.name", "%d is not from %d to %d, the numbers of this cluster", id, uint32(model.IdentityMin), uint32(model.IdentityMax))
		return row, p
	}
	row.Labels = model.LabelsOf(o.SecurityLabels)
	return row, p
}

func convertNamespace(ns *corev1.Namespace) (state.Namespace, problems) {
	return state.Namespace{Name: ns.Name, Labels: ns.Labels}, nil
}
