module github.com/lash-net/lash

go 1.26
