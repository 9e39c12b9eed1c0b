"""Rank 0 ends in the way that its first argument names; the others wait for it in a collective."""

import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist

if sys.argv[1] == "late":  # the worker that only lost its peer is gone before the peer itself
    if os.environ["RANK"] == "1":
        raise RuntimeError("[third_party/gloo/gloo/transport/tcp/pair.cc:553] Connection closed by peer")
    while not Path(os.environ["REGROW_ORDER"]).with_name("error-1.json").exists():
        pass
    raise ValueError("the reason")

dist.init_process_group("gloo")
dist.all_reduce(torch.ones(1))
if dist.get_rank() == 0:
    match sys.argv[1]:
        case "raise":
            raise ValueError("the loss is not a number")
        case "exit":
            sys.exit(int(sys.argv[2]))
        case "message":
            sys.exit("out of data")
        case "abort":
            os.abort()
        case "cleanup":
            try:
                raise KeyError("weights")
            finally:
                dist.destroy_process_group()
                dist.all_reduce(torch.ones(1))
dist.all_reduce(torch.ones(1))
