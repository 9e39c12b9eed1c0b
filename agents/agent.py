"""The agent daemon: ties uplink, supervisor and probes together and ends them in order."""

from __future__ import annotations

import asyncio
import logging
import signal
import uuid

import psutil

from agents.probes.host import HostProbe
from agents.processes import adopt_orphans
from agents.settings import Settings
from agents.supervisor import Site, Supervisor
from agents.uplink import Uplink
from orchestrator.core.types import NodeReport

log = logging.getLogger(__name__)


class Agent:
    """One node's agent."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._instance = uuid.uuid4().hex
        self._memory_bytes = psutil.virtual_memory().total
        self._host = HostProbe(settings.runtime_dir)
        site = Site(settings.node, settings.address, settings.runtime_dir)
        self._supervisor = Supervisor(site, settings.preload, self._changed)
        self._uplink = Uplink(settings.controller, settings.node, settings.token, self.report, self._supervisor.obey)

    def report(self) -> NodeReport:
        """Everything that is on this node now."""
        return NodeReport(
            node=self._settings.node,
            instance=self._instance,
            address=self._settings.address,
            devices=self._settings.devices,
            device_memory_bytes=self._memory_bytes // self._settings.devices,
            warm=self._supervisor.warm,
            launch=self._supervisor.report(),
            probes=self._host.read(),
            rack=self._settings.rack,
            speed=self._settings.speed,
        )

    async def run(self) -> None:
        """Until SIGTERM or SIGINT; raises Refused or Conflict when the controller will not have this agent."""
        adopt_orphans()
        stop = asyncio.Event()
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, stop.set)
        tasks = [loop.create_task(work) for work in (self._supervisor.run(), self._uplink.run(), _wait(stop))]
        try:
            await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            await self._supervisor.close()
            await self._uplink.farewell()
        finally:
            for task in tasks:
                task.cancel()
            results = await asyncio.gather(*tasks, return_exceptions=True)
        for result in results:
            if isinstance(result, Exception):
                raise result

    def _changed(self, urgent: bool) -> None:
        self._uplink.changed(urgent)


async def _wait(event: asyncio.Event) -> None:
    await event.wait()
