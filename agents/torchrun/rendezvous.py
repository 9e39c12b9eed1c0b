"""Rendezvous backend `regrow`: the controller has already decided who takes part, so nothing is negotiated.

Each generation gets a fresh TCPStore on a port that the kernel chose, hosted by the node of rank 0; the other nodes
park in `next_rendezvous` until the controller has told their agent the endpoint. Stock torch 2.13 reuses the store
over restarts, which lets workers meet the addresses of dead ranks.

torch loads this module while it is still importing its own rendezvous package: import from `.api` only.
"""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta

import torch.distributed as dist
from torch.distributed.elastic.rendezvous.api import (
    RendezvousHandler,
    RendezvousHandlerCreator,
    RendezvousInfo,
    RendezvousParameters,
    RendezvousStoreInfo,
)

from orchestrator.core.errors import InvalidInput

BACKEND = "regrow"
CONNECT_S = 60.0
"""How long a node tries to reach the store of the generation's first node."""


class RegrowRendezvousHandler(RendezvousHandler):
    """One rendezvous of one generation.

    `publish` is called with the endpoint on the hosting node (`node_rank` 0); `wait_for_endpoint` blocks on the others.
    """

    def __init__(
        self,
        *,
        run_id: str,
        generation: int,
        node_rank: int,
        nodes: int,
        address: str,
        publish: Callable[[str], None],
        wait_for_endpoint: Callable[[], str],
    ) -> None:
        self._run_id = run_id
        self._generation = generation
        self._node_rank = node_rank
        self._nodes = nodes
        self._address = address
        self._publish = publish
        self._wait_for_endpoint = wait_for_endpoint

    def get_backend(self) -> str:
        """Name under which torchrun knows this backend."""
        return BACKEND

    @property
    def use_agent_store(self) -> bool:
        """Workers meet in the store made here; none of them hosts one."""
        return True

    def next_rendezvous(self) -> RendezvousInfo:
        """Host or reach the generation's store; blocks until its endpoint is known.

        Keys of the elastic agents carry the generation, so that a late message of an older one meets nobody.
        """
        if self._node_rank == 0:
            store = _tcp_store(self._address, 0, host=True)
            host, port = self._address, store.port
            self._publish(f"{host}:{port}")
        else:
            host, port = split_endpoint(self._wait_for_endpoint())
            store = _tcp_store(host, port, host=False)
        prefixed = dist.PrefixStore(f"regrow/generation-{self._generation}", store)
        return RendezvousInfo(prefixed, self._node_rank, self._nodes, RendezvousStoreInfo(host, port))

    def is_closed(self) -> bool:
        """Never: the agent ends a generation by ending this process."""
        return False

    def set_closed(self) -> None:
        """Nothing to tell the others: the controller does."""

    def num_nodes_waiting(self) -> int:
        """None: a change of nodes is a new generation."""
        return 0

    def get_run_id(self) -> str:
        """Name of the job."""
        return self._run_id

    def shutdown(self) -> bool:
        """The store ends with this process."""
        return True


def _tcp_store(address: str, port: int, *, host: bool) -> dist.TCPStore:
    return dist.TCPStore(
        address, port, is_master=host, wait_for_workers=False, timeout=timedelta(seconds=CONNECT_S), multi_tenant=False
    )


def split_endpoint(endpoint: str) -> tuple[str, int]:
    """`"10.0.0.1:29500"` -> `("10.0.0.1", 29500)`; raises InvalidInput when it is not of that form."""
    host, _, port = endpoint.rpartition(":")
    if not host or not port.isdigit():
        raise InvalidInput(f"the store endpoint {endpoint!r} is not of the form host:port")
    return host, int(port)


def create_handler(params: RendezvousParameters) -> RegrowRendezvousHandler:
    """The creator that torch calls; raises InvalidInput outside of an agent's launch."""
    if "generation" not in params.config:
        raise InvalidInput(
            "the rendezvous backend 'regrow' needs the agent of this node to tell it the generation: "
            "start the node with 'regrow agent' instead of 'torchrun --rdzv-backend regrow'"
        )
    return RegrowRendezvousHandler(
        run_id=params.run_id, nodes=params.max_nodes, address=params.local_addr, **params.config
    )


def get_handler() -> RendezvousHandlerCreator:
    """Entry point of the group `torchrun.handlers`: returns the creator."""
    return create_handler
