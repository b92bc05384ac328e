// SPDX-License-Identifier: Apache-2.0

package cli

import (
	"context"
	"errors"
	"fmt"
	"os"
	"time"

	"github.com/spf13/cobra"
	"helm.sh/helm/v3/pkg/action"
	"helm.sh/helm/v3/pkg/chart"
	helmcli "helm.sh/helm/v3/pkg/cli"
	helmvalues "helm.sh/helm/v3/pkg/cli/values"
	"helm.sh/helm/v3/pkg/getter"
	"helm.sh/helm/v3/pkg/release"
	"helm.sh/helm/v3/pkg/storage/driver"

	"github.com/lash-net/lash/deploy"
	"github.com/lash-net/lash/internal/version"
)

const releaseName = "lash"

// release options that install and upgrade share.
type releaseOptions struct {
	values     helmvalues.Options
	version    string
	dryRun     bool
	wait       bool
	waitFor    time.Duration
	reuse      bool
	showValues bool
}

func (o *releaseOptions) flags(cmd *cobra.Command) {
	f := cmd.Flags()
	f.StringArrayVar(&o.values.Values, "set", nil, "set a value, as in --set bpf.masquerade=true (repeatable)")
	f.StringArrayVar(&o.values.StringValues, "set-string", nil, "set a value that is text")
	f.StringSliceVarP(&o.values.ValueFiles, "values", "f", nil, "read values from this YAML file (repeatable)")
	f.StringVar(&o.version, "version", "", "version of the chart, to be sure which one is installed")
	f.BoolVar(&o.dryRun, "dry-run", false, "print what would be applied, and apply nothing")
	f.BoolVar(&o.wait, "wait", false, "wait until agents and operator are ready on all nodes")
	f.DurationVar(&o.waitFor, "wait-duration", 5*time.Minute, "how long --wait waits")
	f.BoolVar(&o.showValues, "show-values", false, "print all values with their defaults and meanings, and do nothing")
}

func (a *app) installCommand() *cobra.Command {
	o := &releaseOptions{}
	cmd := &cobra.Command{
		Use:     "install",
		Short:   "Install Lash on the cluster of the kubeconfig",
		GroupID: "cluster",
		Args:    cobra.NoArgs,
		Long: `Install Lash on the cluster of the kubeconfig, as the Helm release "lash".

What can be found out about the cluster is: the address of the API server, the cluster's name, its address families. Values
given with --set or --values win. Old spellings of values are translated; unknown ones are refused.`,
		Example: `  lash install --wait
  lash install --context prod --set cluster.name=prod --set ipv4NativeRoutingCIDR=10.0.0.0/8
  lash install --values values.yaml --dry-run`,
		RunE: func(cmd *cobra.Command, _ []string) error { return a.runRelease(cmd.Context(), o, false) },
	}
	o.flags(cmd)
	return cmd
}

func (a *app) upgradeCommand() *cobra.Command {
	o := &releaseOptions{}
	cmd := &cobra.Command{
		Use:     "upgrade",
		Short:   "Change the version or the values of an installed Lash",
		GroupID: "cluster",
		Args:    cobra.NoArgs,
		Long: `Change the version or the values of an installed Lash. Agents restart one after another; connections go on, for the
datapath stays in the kernel.`,
		Example: `  lash upgrade --reuse-values --set bpf.hostLegacyRouting=true --wait
  lash upgrade --values values.yaml --dry-run`,
		RunE: func(cmd *cobra.Command, _ []string) error { return a.runRelease(cmd.Context(), o, true) },
	}
	o.flags(cmd)
	cmd.Flags().BoolVar(&o.reuse, "reuse-values", false, "start from the values of the present release")
	return cmd
}

// runRelease installs or upgrades.
func (a *app) runRelease(ctx context.Context, o *releaseOptions, upgrade bool) error {
	if o.showValues {
		b, err := deploy.Chart.ReadFile("lash/values.yaml")
		if err == nil {
			_, err = a.Out.Write(b)
		}
		return err
	}
	c, err := loadChart()
	if err != nil {
		return err
	}
	if o.version != "" && o.version != c.Metadata.Version {
		return fmt.Errorf("--version=%s: this command brings version %s of the chart: use the lash command of version %[1]s, or leave --version out", o.version, c.Metadata.Version)
	}
	values, err := o.values.MergeValues(getter.All(helmcli.New()))
	if err != nil {
		return fmt.Errorf("values: %w", err)
	}
	known, err := knownValues(c)
	if err != nil {
		return err
	}
	said, err := translateValues(values, known)
	if err != nil {
		return err
	}
	for _, s := range said {
		fmt.Fprintln(a.Err, s)
	}

	k, err := a.cluster()
	if err != nil {
		return err
	}
	helm, err := k.helm(a.namespace)
	if err != nil {
		return err
	}
	current, err := helm.Releases.Last(releaseName)
	if err != nil && !errors.Is(err, driver.ErrReleaseNotFound) {
		return fmt.Errorf("look for the release: %w", err)
	}
	installed := current != nil && current.Info.Status != release.StatusUninstalled
	switch {
	case upgrade && !installed:
		return fmt.Errorf("Lash is not installed in namespace %s: use 'lash install'", a.namespace)
	case !upgrade && installed && current.Info.Status == release.StatusDeployed && !o.dryRun:
		return fmt.Errorf("Lash is already installed (revision %d): use 'lash upgrade', with --reuse-values to keep its values", current.Version)
	}
	if upgrade && o.reuse {
		values = mergeOver(current.Config, values)
	}
	if version.Version != "dev" {
		if _, ok := lookupValue(values, "image.tag"); !ok {
			setValue(values, "image.tag", version.Version)
		}
	}
	f, err := k.facts(ctx)
	if err != nil {
		return err
	}
	found, warnings, err := detect(f, values)
	if err != nil {
		return err
	}
	notes, err := checkValues(c, values, a.namespace)
	if err != nil {
		return err
	}

	say := func(format string, args ...any) { fmt.Fprintf(a.Err, format+"\n", args...) }
	say("cluster      %s, %d nodes", k.rest.Host, len(f.nodes))
	for _, s := range found {
		say("found        %s", s)
	}
	for _, s := range append(warnings, notes...) {
		say("warning      %s", s)
	}
	rel, err := apply(ctx, helm, c, values, o, upgrade || installed, a.namespace)
	if err != nil {
		return err
	}
	if o.dryRun {
		fmt.Fprintln(a.Out, rel.Manifest)
		return nil
	}
	what := "installed"
	if upgrade {
		what = "upgraded"
	}
	say("%-12s release %s, revision %d, in namespace %s", what, rel.Name, rel.Version, rel.Namespace)
	if !o.wait {
		say("next         lash status --wait")
		return nil
	}
	return k.waitReady(ctx, a.namespace, o.waitFor, a.Err)
}

// apply is Helm's install or upgrade. A release that failed before it was ever deployed is upgraded, too.
func apply(ctx context.Context, helm *action.Configuration, c *chart.Chart, values map[string]any, o *releaseOptions, upgrade bool, namespace string) (*release.Release, error) {
	if !upgrade {
		i := action.NewInstall(helm)
		i.ReleaseName, i.Namespace, i.Timeout = releaseName, namespace, time.Minute
		i.CreateNamespace = true
		i.Replace = true // of a release that was uninstalled with its history kept
		if o.dryRun {
			i.DryRun, i.DryRunOption = true, "server"
		}
		rel, err := i.RunWithContext(ctx, c, values)
		if err != nil {
			return nil, fmt.Errorf("install: %w", err)
		}
		return rel, nil
	}
	u := action.NewUpgrade(helm)
	u.Namespace, u.Timeout, u.MaxHistory = namespace, time.Minute, 10
	u.ResetValues = true // those to be reused are merged already
	if o.dryRun {
		u.DryRun, u.DryRunOption = true, "server"
	}
	rel, err := u.RunWithContext(ctx, releaseName, c, values)
	if err != nil {
		return nil, fmt.Errorf("upgrade: %w", err)
	}
	return rel, nil
}

// helm returns Helm's configuration for the cluster, with Helm's own storage, so that 'helm list' sees the release.
func (k *cluster) helm(namespace string) (*action.Configuration, error) {
	if k.flags.Namespace == nil || *k.flags.Namespace != namespace {
		k.flags.Namespace = &namespace
	}
	c := &action.Configuration{}
	if err := c.Init(k.flags, namespace, os.Getenv("HELM_DRIVER"), func(string, ...any) {}); err != nil {
		return nil, fmt.Errorf("prepare Helm: %w", err)
	}
	if _, err := k.clientset.Discovery().ServerVersion(); err != nil {
		return nil, fmt.Errorf("reach the API server %s: %w", k.rest.Host, err)
	}
	return c, nil
}

// mergeOver returns base with over's values in place of its own.
func mergeOver(base, over map[string]any) map[string]any {
	out := map[string]any{}
	for k, v := range base {
		out[k] = v
	}
	for k, v := range over {
		if sub, ok := v.(map[string]any); ok {
			if old, ok := out[k].(map[string]any); ok {
				out[k] = mergeOver(old, sub)
				continue
			}
		}
		out[k] = v
	}
	return out
}
