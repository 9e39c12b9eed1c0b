"""Has children of every kind that training scripts have; run with a relative path."""

import atexit
import multiprocessing
import os
import subprocess
import sys
import threading
import time


def square(value: int) -> int:
    return value * value


def late() -> None:
    time.sleep(0.2)
    print("thread done")


if __name__ == "__main__":  # what is spawned does not need torch
    import torch
    from torch.utils.data import DataLoader, TensorDataset

    assert sys.argv[0].endswith("children.py")
    assert multiprocessing.current_process().name == "MainProcess"
    loader = DataLoader(TensorDataset(torch.arange(8.0)), batch_size=4, num_workers=1)
    print("loaded", sum(batch.sum().item() for (batch,) in loader))
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        print("squared", pool.apply(square, (7,)))
    done = subprocess.run([sys.executable, "-c", "print(6)"], capture_output=True, text=True, check=True)
    print("subprocess", done.stdout.strip())
    print("matmul", (torch.ones(64, 64) @ torch.ones(64, 64)).sum().item())
    if os.fork() == 0:
        os._exit(0)
    os.wait()
    threading.Thread(target=late).start()
    atexit.register(print, "exit handler")
