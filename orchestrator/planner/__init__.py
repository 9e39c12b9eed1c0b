"""Pure: search over legal meshes, cost and memory models, assignment of ranks to nodes."""
