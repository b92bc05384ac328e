{{/* The routing mode and the tunnel's protocol, from their present names or from the old value "tunnel". */}}
{{- define "lash.routingMode" -}}
{{- if .Values.tunnel -}}
{{ ternary "native" "tunnel" (eq .Values.tunnel "disabled") }}
{{- else -}}
{{ .Values.routingMode }}
{{- end -}}
{{- end -}}

{{- define "lash.tunnelProtocol" -}}
{{- if has .Values.tunnel (list "vxlan" "geneve") -}}
{{ .Values.tunnel }}
{{- else -}}
{{ .Values.tunnelProtocol | default "vxlan" }}
{{- end -}}
{{- end -}}

{{- define "lash.kubeProxyReplacement" -}}
{{- $v := toString .Values.kubeProxyReplacement -}}
{{- if has $v (list "strict" "probe" "partial") -}}true
{{- else if eq $v "disabled" -}}false
{{- else -}}{{ $v }}
{{- end -}}
{{- end -}}

{{- define "lash.image" -}}
{{ .Values.image.repository }}:{{ .Values.image.tag | default .Chart.AppVersion }}
{{- end -}}

{{/* The API server, for a pod that must reach it before services work. */}}
{{- define "lash.apiServerEnv" -}}
{{- if .Values.k8sServiceHost }}
- name: KUBERNETES_SERVICE_HOST
  value: {{ .Values.k8sServiceHost | quote }}
- name: KUBERNETES_SERVICE_PORT
  value: {{ .Values.k8sServicePort | default 6443 | toString | quote }}
{{- end }}
{{- end -}}
