"""Trains for ever as far as the agent can see: speaks the worker protocol, and obeys requests to save and to pause.

With the argument `fork` it also starts a child and one more in a session of its own, and prints their pids.
"""

import json
import os
import selectors
import socket
import subprocess
import sys
import time

rank, generation = int(os.environ["RANK"]), int(os.environ["REGROW_GENERATION"])


def say(**message):
    connection.sendall(json.dumps(message).encode() + b"\n")


def save(step):
    names = ("generation", "step", "rank", "part", "digest", "size_bytes", "stall_s", "write_s")
    values = (generation, step, rank, f"step-{step}/part-{rank}.json", "00", 1, 0.0, 0.0)
    say(type="save", report=dict(zip(names, values, strict=True)))


if "fork" in sys.argv:
    child = os.fork()
    if child == 0:
        time.sleep(600)
        os._exit(0)
    away = subprocess.Popen(["sleep", "600"], start_new_session=True)
    print("children", child, away.pid, flush=True)

connection = socket.socket(socket.AF_UNIX)
connection.connect(os.environ["REGROW_SOCKET"])
say(type="hello", generation=generation, rank=rank, pid=os.getpid())
say(type="ready", step=5)
selector = selectors.DefaultSelector()
selector.register(connection, selectors.EVENT_READ)
step, received = 5, b""
while True:
    step += 1
    say(type="progress", step=step, loss=1.0 / step if rank == 0 else None, loss_step=step)
    for _ in selector.select(0.01):
        *lines, received = (received + connection.recv(4096)).split(b"\n")
        for line in lines:
            request = json.loads(line)
            print("request", json.dumps(request), flush=True)
            save(step)
            if request["pause"]:
                say(type="paused", step=step)
                sys.exit(0)
