"""The channel against a real unix socket: what the agent hears, and what happens when it does not listen."""

from __future__ import annotations

import json
import os
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from orchestrator.core.types import SaveReport
from orchestrator.trainer import channel as channels
from orchestrator.trainer.channel import Channel, Request

REPORT = SaveReport(1, 5, 3, "step-5/part-3.json", "ab", 10, 0.5, 1.5)
DEADLINE_S = 20.0


def eventually(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + DEADLINE_S
    while not condition():
        assert time.monotonic() < deadline, "condition did not come true"
        time.sleep(0.01)


class Listener:
    """An agent's socket that takes one connection at a time."""

    def __init__(self, path: Path) -> None:
        self.socket = socket.socket(socket.AF_UNIX)
        self.socket.bind(str(path))
        self.socket.listen(4)
        self.socket.settimeout(DEADLINE_S)

    def accept(self) -> socket.socket:
        connection, _ = self.socket.accept()
        connection.settimeout(DEADLINE_S)
        return connection


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "agent.sock"


@pytest.fixture
def listener(path: Path) -> Iterator[Listener]:
    listening = Listener(path)
    yield listening
    listening.socket.close()


@pytest.fixture
def channel(path: Path) -> Iterator[Channel]:
    opened = Channel(path, generation=2, rank=3)
    yield opened
    opened.close()


def receive(connection: socket.socket, count: int, skip_pings: bool = True) -> list[dict[str, Any]]:
    """The next `count` messages."""
    messages: list[dict[str, Any]] = []
    file = connection.makefile("rb")
    while len(messages) < count:
        message = json.loads(file.readline())
        if not (skip_pings and message["type"] == "ping"):
            messages.append(message)
    return messages


def test_the_agent_is_greeted_and_told_everything_in_order(listener: Listener, channel: Channel) -> None:
    channel.ready(4)
    channel.progress(5, 0.25, 4)
    channel.saved(REPORT)
    channel.paused(5)
    with listener.accept() as connection:
        assert receive(connection, 5) == [
            {"type": "hello", "generation": 2, "rank": 3, "pid": os.getpid()},
            {"type": "ready", "step": 4},
            {"type": "progress", "step": 5, "loss": 0.25, "loss_step": 4},
            {
                "type": "save",
                "report": {
                    "generation": 1,
                    "step": 5,
                    "rank": 3,
                    "part": "step-5/part-3.json",
                    "digest": "ab",
                    "size_bytes": 10,
                    "stall_s": 0.5,
                    "write_s": 1.5,
                },
            },
            {"type": "paused", "step": 5},
        ]
        assert channel.flush(DEADLINE_S)


def test_it_pings_without_being_used(listener: Listener, channel: Channel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(channels, "PING_S", 0.05)
    with listener.accept() as connection:
        messages = receive(connection, 3, skip_pings=False)
    assert [message["type"] for message in messages] == ["hello", "ping", "ping"]


def test_requests_only_ever_grow_and_what_is_not_understood_is_ignored(listener: Listener, channel: Channel) -> None:
    assert channel.request == Request(0, False)
    with listener.accept() as connection:
        receive(connection, 1)
        connection.sendall(b'{"type":"save","request":2,"pause":false}\n')
        eventually(lambda: channel.request == Request(2, False))
        connection.sendall(b'[1]\nnot json\n{"type":"save"}\n{"type":"news"}\n')
        connection.sendall(b'{"type":"save","request":3,"pa')
        connection.sendall(b'use":true}\n{"type":"save","request":1,"pause":false}\n')
        eventually(lambda: channel.request == Request(3, True))


def test_a_lost_connection_is_opened_again_and_nothing_queued_is_lost(listener: Listener, channel: Channel) -> None:
    with listener.accept() as connection:
        assert receive(connection, 1)[0]["type"] == "hello"
    channel.paused(7)
    with listener.accept() as connection:
        first, *rest = receive(connection, 2)
        assert first["type"] == "hello"
        assert rest == [{"type": "paused", "step": 7}]


def test_an_agent_that_starts_late_hears_everything(path: Path, channel: Channel) -> None:
    channel.ready(1)
    late = Listener(path)
    with late.accept() as connection:
        assert [message["type"] for message in receive(connection, 2)] == ["hello", "ready"]
    late.socket.close()


def test_training_is_not_held_up_by_an_agent_that_does_not_listen(path: Path, channel: Channel) -> None:
    """Old progress is dropped first; saves are kept."""
    channel.saved(REPORT)
    began = time.monotonic()
    for step in range(5 * channels.QUEUE_LIMIT):
        channel.progress(step, None, None)
    assert time.monotonic() - began < DEADLINE_S
    assert not channel.flush(0.05)
    late = Listener(path)
    with late.accept() as connection:
        messages = receive(connection, channels.QUEUE_LIMIT + 1)
    late.socket.close()
    assert messages[1]["type"] == "save"
    assert messages[-1]["step"] == 5 * channels.QUEUE_LIMIT - 1


def test_without_an_agent_messages_go_nowhere() -> None:
    channel = Channel(None, generation=0, rank=0)
    channel.ready(0)
    assert channel.flush(0.0)
    channel.close()


def test_closing_twice_is_fine(listener: Listener, path: Path) -> None:
    channel = Channel(path, generation=1, rank=0)
    channel.close()
    channel.close()
    channel.progress(1, None, None)
