"""Makes the processes of this node what the controller's directive says, and keeps the account of them.

Decisions are `agents.reconcile`'s, the account is `agents.launch`'s; this is the shell between them, the warm process
and the worker socket.
"""

from __future__ import annotations

import asyncio
import json
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from agents.channel import ELASTIC, Channel
from agents.launch import Launch
from agents.probes.workers import HeldProbe
from agents.processes import kill_group
from agents.reconcile import AskSave, Start, Stop, TellEndpoint, reconcile
from agents.warm import WarmProcess
from orchestrator import wire
from orchestrator.core.types import Directive, LaunchOrder, LaunchReport, LaunchState

log = logging.getLogger(__name__)

PROBE_S = 0.5
"""How often workers are looked at for being stopped."""
LAST_WORDS_S = 1.0
"""How long to wait for messages of processes that are already dead."""
STUBBORN_S = 2.0
"""A stop that takes longer than this is enforced by killing the warm process, too."""


@dataclass(frozen=True, slots=True)
class Site:
    """Where this node is: what every launch needs to know."""

    node: str
    address: str
    directory: Path


class Supervisor:
    """Runs at most one launch; `changed` is called whenever the report changes, with True when that is urgent."""

    def __init__(self, site: Site, preload: str | None, changed: Callable[[bool], None]) -> None:
        self._site = site
        self._changed = changed
        self._channel = Channel(site.directory, self._received)
        self._warm = WarmProcess(site.directory, preload, self._warm_said)
        self._held = HeldProbe()
        self._directive: Directive | None = None
        self._newest = 0
        self._launch: Launch | None = None
        self._begun = False
        """True once the warm process was told to fork the current launch."""
        self._closing = False
        self._ended = asyncio.Event()
        self._save_every_s: float | None = None
        self._retimed = asyncio.Event()
        self._tasks: set[asyncio.Task[None]] = set()

    async def run(self) -> None:
        """Serve until cancelled."""
        async with asyncio.TaskGroup() as group:
            group.create_task(self._channel.serve())
            group.create_task(self._warm.run())
            group.create_task(self._probe())

    @property
    def warm(self) -> bool:
        """True when a launch would start at once."""
        return self._warm.warm

    def report(self) -> LaunchReport | None:
        """The launch that runs or ran last."""
        return self._launch.report(time.monotonic()) if self._launch is not None else None

    def obey(self, directive: Directive) -> None:
        """Take over a directive of the controller."""
        self._newest = max(self._newest, directive.generation)
        if directive.generation < self._newest:
            log.warning("ignored a directive of generation %d: %d exists", directive.generation, self._newest)
            return
        self._directive = directive
        if self._launch is not None and self._launch.generation == directive.generation:
            self._launch.forget_saves(directive.committed_step)
            self._retime(self._launch, directive.launch)
        self._reconcile()

    async def close(self) -> None:
        """Stop what runs and wait until it is gone; nothing is started any more."""
        self._closing = True
        if self._launch is not None and not self._launch.ended:
            self._stop(self._launch, "the agent is ending")
            await self._ended.wait()

    # ------------------------------------------------------------ actions

    def _reconcile(self) -> None:
        if self._directive is None or self._closing:
            return
        current = self._launch.current() if self._launch is not None else None
        for action in reconcile(current, self._directive, self._site.node, self._newest):
            match action:
                case Start(order):
                    self._start(order)
                case Stop(reason):
                    self._stop(self._require(), reason)
                case TellEndpoint(endpoint):
                    self._tell_endpoint(self._require(), endpoint)
                case AskSave(request, pause):
                    self._ask_save(self._require(), request, pause)

    def _require(self) -> Launch:
        assert self._launch is not None, "reconcile acted on a launch that does not exist"
        return self._launch

    def _start(self, order: LaunchOrder) -> None:
        part = order.generation.assignment.of(self._site.node)
        assert part is not None, "reconcile started a launch without a part for this node"
        directory = self._site.directory / f"generation-{order.generation.number:04}"
        launch = self._launch = Launch(order, part, directory)
        self._begun = False
        self._ended.clear()
        log.info("starting generation %d, ranks from %d", launch.generation, part.first_rank)
        try:
            _lay_out(directory, order)
        except OSError as error:
            launch.stillborn(f"the launch folder {directory} cannot be written: {error.strerror}", time.time())
            self._finished(launch)
            return
        self._begin(launch)
        self._changed(True)

    def _begin(self, launch: Launch) -> None:
        if not self._warm.warm or self._begun or launch.ended:
            return
        self._begun = True
        self._warm.launch(
            directory=str(launch.directory.resolve()),
            socket=str(self._channel.path),
            node=self._site.node,
            address=self._site.address,
        )
        self._save_every_s = launch.order.save_every_s
        if launch.hosts_store:
            self._spawn(self._save_timer(launch))

    def _stop(self, launch: Launch, reason: str) -> None:
        if launch.stop_ordered:
            return
        log.info("stopping generation %d: %s", launch.generation, reason)
        launch.stop_ordered = True
        launch.state = LaunchState.STOPPING
        if not self._begun:
            launch.end(0, {}, time.time())
            self._finished(launch)
            return
        if launch.group is not None:
            kill_group(launch.group)
        self._spawn(self._enforce_stop(launch))
        self._changed(True)

    async def _enforce_stop(self, launch: Launch) -> None:
        await asyncio.sleep(STUBBORN_S)
        if not launch.ended:
            log.warning("generation %d is still not gone: killing the warm process above it", launch.generation)
            self._warm.kill()

    def _tell_endpoint(self, launch: Launch, endpoint: str) -> None:
        launch.endpoint_told = self._channel.send(launch.generation, ELASTIC, type="store", endpoint=endpoint)

    def _ask_save(self, launch: Launch, request: int, pause: bool) -> None:
        launch.ordered_save, launch.pausing = request, pause
        self._request_save(launch)

    def _request_save(self, launch: Launch) -> None:
        """Ask the worker of rank 0 alone: the workers agree among themselves when."""
        if launch.hosts_store:
            launch.request += 1
            self._send_request(launch)

    def _send_request(self, launch: Launch) -> None:
        self._channel.send(launch.generation, 0, type="save", request=launch.request, pause=launch.pausing)

    def _retime(self, launch: Launch, order: LaunchOrder | None) -> None:
        """The controller may change its mind about how often a running generation saves."""
        if order is not None and order.save_every_s != self._save_every_s:
            self._save_every_s = order.save_every_s
            log.info("generation %d saves every %s s", launch.generation, order.save_every_s)
            self._retimed.set()

    async def _save_timer(self, launch: Launch) -> None:
        asked_s = time.monotonic()
        while not launch.ended:
            self._retimed.clear()
            every_s = self._save_every_s
            left_s = None if every_s is None else max(0.0, asked_s + every_s - time.monotonic())
            try:
                await asyncio.wait_for(self._retimed.wait(), left_s)
            except TimeoutError:
                asked_s = time.monotonic()
                if launch.training:
                    self._request_save(launch)

    # ------------------------------------------------------------ what is heard

    def _received(self, generation: int, rank: int, message: dict[str, Any]) -> None:
        launch = self._launch
        if launch is None or launch.generation != generation:
            raise ValueError(f"it is of generation {generation}, which does not run here")
        now_s, urgent = time.monotonic(), True
        if rank == ELASTIC:
            launch.from_elastic(message, now_s)
        else:
            urgent = launch.from_worker(rank, message, now_s)
            if message["type"] == "hello" and rank == 0 and launch.request:
                self._send_request(launch)
        if urgent:
            self._reconcile()
        if message["type"] != "ping":
            self._changed(urgent)

    def _warm_said(self, event: dict[str, Any]) -> None:
        launch = self._launch
        alive = launch is not None and not launch.ended
        match event["event"]:
            case "warm" if launch is not None:
                self._begin(launch)
            case "launched" if launch is not None:
                launch.group = int(event["pid"])
                if launch.stop_ordered:
                    kill_group(launch.group)
            case "gone" if launch is not None and alive:
                reaped = {int(pid): int(code) for pid, code in event["reaped"].items()}
                self._spawn(self._bury(launch, lambda: launch.end(int(event["exit_code"]), reaped, time.time())))
            case "died" if launch is not None and alive:
                code, reason = int(event["exit_code"]), str(event["reason"])
                self._spawn(self._bury(launch, lambda: launch.lost(reason, code, time.time())))
        self._changed(True)

    async def _bury(self, launch: Launch, end: Callable[[], None]) -> None:
        """Conclude a launch of which no process is alive, after what they had still said was taken in."""
        await self._channel.drained(LAST_WORDS_S)
        if not launch.ended:
            end()
            self._finished(launch)

    def _finished(self, launch: Launch) -> None:
        log.info("generation %d has ended: %s", launch.generation, launch.state)
        self._held.forget()
        self._ended.set()
        self._changed(True)
        self._reconcile()

    async def _probe(self) -> None:
        while True:
            await asyncio.sleep(PROBE_S)
            launch = self._launch
            if launch is None or launch.ended:
                continue
            for worker in launch.workers.values():
                held = worker.exit_code is None and self._held.look(worker.pid)
                if held != worker.held:
                    worker.held = held
                    self._changed(True)

    def _spawn(self, coroutine: Any) -> None:
        task = asyncio.get_running_loop().create_task(coroutine)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)


def _lay_out(directory: Path, order: LaunchOrder) -> None:
    """Make the launch folder; what an earlier agent left there of the same generation is not this launch's."""
    directory.mkdir(parents=True, exist_ok=True)
    for stale in directory.glob("error-*.json"):
        stale.unlink()
    (directory / "order.json").write_text(json.dumps(wire.to_data(order)))
