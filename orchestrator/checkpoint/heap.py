"""The garbage collector while metadata are read."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def uncollected() -> Iterator[None]:
    """Nothing is collected within: what a view is built of stays, and makes no cycles.

    In a process with torch each full collection walks a million objects, and reading the metadata of a large checkpoint
    sets off several: up to 0.2 s for a view that takes 0.04 s. Threads may overlap: collecting goes on with the first.
    """
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()
