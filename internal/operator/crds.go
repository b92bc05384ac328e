// SPDX-License-Identifier: Apache-2.0

package operator

import (
	"context"
	"crypto/sha256"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"time"

	apiextensionsv1 "k8s.io/apiextensions-apiserver/pkg/apis/apiextensions/v1"
	apiextensionsclient "k8s.io/apiextensions-apiserver/pkg/client/clientset/clientset/typed/apiextensions/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/util/wait"

	"github.com/lash-net/lash/api/crd"
)

// digestAnnotation holds a digest of the definition as it was installed, for the API server adds defaults to it.
const digestAnnotation = "lash.io/definition-digest"

// installDefinitions makes the cluster serve every kind of package crd and returns when it does. A definition that
// somebody else installed is left alone as long as it serves version v2.
func installDefinitions(ctx context.Context, log *slog.Logger, client apiextensionsclient.CustomResourceDefinitionInterface) error {
	crds, err := crd.All()
	if err != nil {
		return err
	}
	var errs []error
	for _, c := range crds {
		if err := installDefinition(ctx, log, client, c); err != nil {
			errs = append(errs, fmt.Errorf("install definition %s: %w", c.Name, err))
		}
	}
	if err := errors.Join(errs...); err != nil {
		return err
	}
	for _, c := range crds {
		err := wait.PollUntilContextTimeout(ctx, 100*time.Millisecond, 30*time.Second, true, func(ctx context.Context) (bool, error) {
			got, err := client.Get(ctx, c.Name, metav1.GetOptions{})
			return err == nil && established(got), nil
		})
		if err != nil {
			return fmt.Errorf("wait until %s is served: %w", c.Name, err)
		}
	}
	return nil
}

func installDefinition(ctx context.Context, log *slog.Logger, client apiextensionsclient.CustomResourceDefinitionInterface, want *apiextensionsv1.CustomResourceDefinition) error {
	b, err := json.Marshal(want.Spec)
	if err != nil {
		return err
	}
	want.Annotations = map[string]string{digestAnnotation: fmt.Sprintf("%x", sha256.Sum256(b))}

	have, err := client.Get(ctx, want.Name, metav1.GetOptions{})
	if apierrors.IsNotFound(err) {
		log.Info("definition installed", "definition", want.Name)
		_, err = client.Create(ctx, want, metav1.CreateOptions{})
		return err
	}
	if err != nil {
		return err
	}
	if have.Labels[crd.ManagedByLabel] != crd.ManagedBy {
		for _, v := range have.Spec.Versions {
			if v.Name == "v2" && v.Served {
				log.Info("definition left as it is: it was not installed by Lash", "definition", want.Name)
				return nil
			}
		}
		return fmt.Errorf("it exists, was not installed by Lash and does not serve v2: delete it if nothing uses it, or label it %s=%s to have it updated", crd.ManagedByLabel, crd.ManagedBy)
	}
	if have.Annotations[digestAnnotation] == want.Annotations[digestAnnotation] {
		return nil
	}
	have = have.DeepCopy()
	have.Spec = want.Spec
	if have.Annotations == nil {
		have.Annotations = map[string]string{}
	}
	have.Annotations[digestAnnotation] = want.Annotations[digestAnnotation]
	log.Info("definition updated", "definition", want.Name)
	_, err = client.Update(ctx, have, metav1.UpdateOptions{})
	return err
}

func established(c *apiextensionsv1.CustomResourceDefinition) bool {
	for _, cond := range c.Status.Conditions {
		if cond.Type == apiextensionsv1.Established {
			return cond.Status == apiextensionsv1.ConditionTrue
		}
	}
	return false
}
