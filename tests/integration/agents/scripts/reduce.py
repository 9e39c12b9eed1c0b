"""Forms the world, reduces once, and says what it found in its environment."""

import json
import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist

dist.init_process_group("gloo")
total = torch.tensor([float(dist.get_rank() + 1)])
dist.all_reduce(total)
names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "GROUP_RANK", "OMP_NUM_THREADS", "REGROW_GENERATION")
print(
    json.dumps(
        {
            "sum": total.item(),
            "argv": sys.argv[1:],
            "path": sys.path[0],
            "cwd": str(Path.cwd()),
            "main": __name__,
            "mesh": json.loads(os.environ["REGROW_MESH"]),
            "token": os.environ.get("REGROW_TOKEN"),
            "extra": os.environ.get("EXTRA"),
            "random": torch.rand(1).item(),
            **{name: os.environ[name] for name in names},
        }
    )
)
dist.destroy_process_group()
