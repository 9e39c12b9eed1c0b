"""torch.distributed.elastic plug-ins: rendezvous handler, elastic agent and the warm process that forks workers."""
