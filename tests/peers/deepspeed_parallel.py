"""Pipeline and tensor parallelism."""
