"""Trains for ever as far as the agent can see: speaks the worker protocol, and obeys requests to save and to pause.

With the argument `deaf` nothing but SIGKILL ends it: neither a hang-up nor the loss of its agent. With the argument
`fork` it also starts a child and one more in a session of its own, and prints their pids.
"""

import contextlib
import json
import os
import selectors
import signal
import socket
import subprocess
import sys
import time

rank, generation = int(os.environ["RANK"]), int(os.environ["REGROW_GENERATION"])


def say(**message):
    with contextlib.suppress(ConnectionError if "deaf" in sys.argv else ()):
        connection.sendall(json.dumps(message).encode() + b"\n")


def hear():
    data = b""
    with contextlib.suppress(ConnectionError if "deaf" in sys.argv else ()):
        data = connection.recv(4096)
    if not data:
        selector.unregister(connection)
    return data


def save(step):
    names = ("generation", "step", "rank", "part", "digest", "size_bytes", "stall_s", "write_s")
    values = (generation, step, rank, f"step-{step}/part-{rank}.json", "00", 1, 0.0, 0.0)
    say(type="save", report=dict(zip(names, values, strict=True)))


if "deaf" in sys.argv:
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
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
        *lines, received = (received + hear()).split(b"\n")
        for line in lines:
            request = json.loads(line)
            print("request", json.dumps(request), flush=True)
            save(step)
            if request["pause"]:
                say(type="paused", step=step)
                sys.exit(0)
