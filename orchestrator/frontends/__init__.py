"""Small composition roots: the local run, the daemon and the operator each plug their hosts into one controller."""
