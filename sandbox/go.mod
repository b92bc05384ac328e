module github.com/lash-net/lash/sandbox

go 1.26

require (
	github.com/cilium/ebpf v0.21.0
	github.com/gopacket/gopacket v1.3.1
	github.com/spf13/cobra v1.10.1
	golang.org/x/sys v0.38.0
)

require (
	github.com/inconshreveable/mousetrap v1.1.0 // indirect
	github.com/spf13/pflag v1.0.9 // indirect
	golang.org/x/net v0.46.0 // indirect
)
