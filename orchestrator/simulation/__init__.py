"""A virtual-time host for the same core: failure models, traces, policies."""
