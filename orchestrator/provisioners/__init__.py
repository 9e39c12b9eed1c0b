"""Where nodes come from: static hosts, local processes, Kubernetes pods."""
