"""Runs benchmarks, all or those named, and prints one JSON object, also written to `build/bench.json`."""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

from tests.bench import recovery
from tests.bench.checkpoint import distributed, manifests, native, universal
from tests.bench.planner import search
from tests.bench.simulation import study

CHECKPOINT_BYTES = 256 << 20


def checkpoint() -> dict[str, Any]:
    """The native format on the disk of temporary files."""
    with tempfile.TemporaryDirectory() as folder:
        return native.measure(Path(folder), CHECKPOINT_BYTES)


BENCHMARKS = {
    "checkpoint": checkpoint,
    "checkpoint-universal": universal.measure,
    "checkpoint-distributed": distributed.measure,
    "checkpoint-manifests": manifests.measure,
    "planner": search.measure,
    "recovery": recovery.measure,
    "simulation": study.measure,
}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.bench", description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"any of {', '.join(BENCHMARKS)}; without, all")
    names = parser.parse_args().names
    if unknown := set(names) - BENCHMARKS.keys():
        parser.error(f"there is no benchmark {min(unknown)!r}: choose among {', '.join(BENCHMARKS)}")
    results = {}
    for name in names or list(BENCHMARKS):
        print(f"{name} ...", file=sys.stderr, flush=True)
        results[name] = BENCHMARKS[name]()
    text = json.dumps(results, indent=2)
    Path("build").mkdir(exist_ok=True)
    Path("build/bench.json").write_text(text + "\n")
    print(text)


if __name__ == "__main__":
    main()
