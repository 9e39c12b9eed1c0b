from __future__ import annotations

import queue
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
from torch.distributed.elastic.rendezvous import RendezvousParameters
from torch.distributed.elastic.rendezvous.registry import get_rendezvous_handler

from agents.torchrun.elastic import leave
from agents.torchrun.rendezvous import RegrowRendezvousHandler, split_endpoint
from orchestrator.core.errors import InvalidInput


def parameters(**config: object) -> RendezvousParameters:
    return RendezvousParameters("regrow", "", "job", 1, 2, local_addr="127.0.0.1", **config)


def test_torchrun_finds_the_backend_and_is_told_to_use_the_agent() -> None:
    with pytest.raises(InvalidInput, match="regrow agent"):
        get_rendezvous_handler(parameters())


def test_nodes_meet_in_a_fresh_store() -> None:
    endpoints: queue.Queue[str] = queue.Queue()

    def handler(node_rank: int, generation: int) -> RegrowRendezvousHandler:
        config = {"publish": endpoints.put, "wait_for_endpoint": lambda: endpoints.get(timeout=30)}
        made = get_rendezvous_handler(parameters(generation=generation, node_rank=node_rank, **config))
        assert isinstance(made, RegrowRendezvousHandler)
        return made

    ports = set()
    for generation in (1, 2):
        host, guest = handler(0, generation), handler(1, generation)
        with ThreadPoolExecutor() as pool:
            waiting = pool.submit(guest.next_rendezvous)
            info = host.next_rendezvous()
            other = waiting.result(30)
        assert (info.rank, info.world_size, other.rank, other.world_size) == (0, 2, 1, 2)
        assert info.bootstrap_store_info is not None
        assert other.bootstrap_store_info == info.bootstrap_store_info
        ports.add(info.bootstrap_store_info.master_port)
        info.store.set("key", "value")
        assert other.store.get("key") == b"value"
        assert host.use_agent_store
        assert host.num_nodes_waiting() == 0
        leaving = threading.Thread(target=leave, args=(info.store, 0, 2, 30.0))
        leaving.start()
        leave(other.store, 1, 2)
        leaving.join(5)
        assert not leaving.is_alive(), "the host may go as soon as all others have"
    assert len(ports) == 2


def test_host_does_not_wait_for_ever() -> None:
    endpoints: list[str] = []
    host = get_rendezvous_handler(
        parameters(generation=1, node_rank=0, publish=endpoints.append, wait_for_endpoint=lambda: "")
    )
    leave(host.next_rendezvous().store, 0, 2, timeout_s=0.1)


def test_guest_that_outlives_the_host_leaves_quietly() -> None:
    endpoints: list[str] = []
    host = get_rendezvous_handler(
        parameters(generation=1, node_rank=0, publish=endpoints.append, wait_for_endpoint=lambda: "")
    )
    hosted = host.next_rendezvous()
    guest = get_rendezvous_handler(
        parameters(generation=1, node_rank=1, publish=endpoints.append, wait_for_endpoint=lambda: endpoints[0])
    )
    store = guest.next_rendezvous().store
    del hosted
    leave(store, 1, 2)


@pytest.mark.parametrize("text", ["", "host", "host:", ":1", "host:port"])
def test_endpoint_of_the_wrong_form(text: str) -> None:
    with pytest.raises(InvalidInput, match="host:port"):
        split_endpoint(text)


def test_endpoint() -> None:
    assert split_endpoint("10.0.0.1:29500") == ("10.0.0.1", 29500)
