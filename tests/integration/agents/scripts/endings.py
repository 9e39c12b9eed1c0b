"""Rank 0 ends in the way that its first argument names; the others wait for it in a collective."""

import os
import sys

import torch
import torch.distributed as dist

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
