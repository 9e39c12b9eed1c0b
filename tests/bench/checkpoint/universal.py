"""Universal checkpoints against DeepSpeed's own converter and `cp -r`: `python -m tests.bench checkpoint-universal`.

About 2 GB (ZeRO 1) and 1.75 GB (ZeRO 3) at world size 4, written by a real run, in the page cache. Rounds are taken in
turn and medians compared. The limit: a copy reads every byte and writes every byte, as `cp` does in one thread.
"""

from __future__ import annotations

import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import psutil

from orchestrator.checkpoint.files import LocalFiles
from orchestrator.checkpoint.formats import open_checkpoint
from orchestrator.checkpoint.layout import Box
from tests.peers import environment

ROUNDS = int(os.environ.get("REGROW_BENCH_ROUNDS", "5"))
WORLD = 4
STAGES = (1, 3)
SETTLE_BYTES = 5 << 29
MAKER = Path(__file__).with_name("deepspeed_state.py")
REGROW = (sys.executable, "-m", "orchestrator.cli", "checkpoint", "convert")


def measure() -> dict[str, Any]:
    """Seconds (medians), peak memory and ratios, by ZeRO stage."""
    return {f"zero{stage}_w{WORLD}": _stage(stage) for stage in STAGES}


def source(stage: int) -> Path:
    """The folder that DeepSpeed saved into, made when it is missing."""
    home = environment.CACHE / f"bench-zero{stage}-{environment.pins()}"
    with environment.locked(home):
        if not home.exists():
            unfinished = home.with_name(f"{home.name}.unfinished")
            shutil.rmtree(unfinished, ignore_errors=True)
            unfinished.mkdir(parents=True)
            peer = environment.deepspeed()
            command = [str(peer / "bin" / "python"), "-m", "torch.distributed.run", "--standalone"]
            command += ["--nproc-per-node", str(WORLD), str(MAKER), str(unfinished), str(stage)]
            _run(command, environment.variables(peer))
            unfinished.rename(home)
    return home


def _stage(stage: int) -> dict[str, Any]:
    saved = source(stage)
    size_bytes = sum(path.stat().st_size for path in saved.rglob("*") if path.is_file())
    _run(["sh", "-c", f"find '{saved}' -type f -exec cat {{}} + > /dev/null"])  # into the page cache
    rows: dict[str, list[float]] = {name: [] for name in ("view", "ours", "trusting", "cp", "peer")}
    peaks: list[int] = []
    commands: dict[str, tuple[list[str], dict[str, str]]] = {
        "ours": (_ours(saved), _as_installed()),
        "trusting": ([*_ours(saved), "--trust"], _as_installed()),
        "cp": (_copy(saved), _as_installed()),
        "peer": _peer(saved),
    }
    for number in range(ROUNDS):
        rows["view"].append(_seconds(lambda: open_checkpoint(saved)))
        for name in _turned(list(commands), number):
            seconds, peak = _timed(*commands[name])
            rows[name].append(seconds)
            peaks += [peak] if name == "ours" else []
    medians = {name: statistics.median(values) for name, values in rows.items()}
    return {
        "bytes": size_bytes,
        "rounds": ROUNDS,
        "view_s": medians["view"],
        "convert_s": medians["ours"],
        "convert_without_checking_s": medians["trusting"],
        "cp_s": medians["cp"],
        "ds_to_universal_s": medians["peer"],
        "times_faster_than_ds_to_universal": medians["peer"] / medians["ours"],
        "ratio_to_cp": medians["ours"] / medians["cp"],
        "ratio_to_cp_without_checking": medians["trusting"] / medians["cp"],
        "peak_rss_mb": max(peaks) / 1e6,
        "bytes_read_for_a_quarter": _quarter(saved),
    }


def _turned(names: list[str], number: int) -> list[str]:
    """Another one first in every round: what follows the peer finds a machine that is still busy."""
    return names[number % len(names) :] + names[: number % len(names)]


def _as_installed() -> dict[str, str]:
    """The environment, with compiled modules kept: as they are after an installation, of the peer's, too."""
    return {key: value for key, value in os.environ.items() if key != "PYTHONDONTWRITEBYTECODE"}


def _ours(saved: Path) -> list[str]:
    return [*REGROW, str(saved), "{target}", "--to", "universal"]


def _copy(saved: Path) -> list[str]:
    return ["cp", "-r", str(saved), "{target}"]


def _peer(saved: Path) -> tuple[list[str], dict[str, str]]:
    home = environment.deepspeed()
    command = [str(home / "bin" / "python"), "-m", "deepspeed.checkpoint.ds_to_universal"]
    command += ["--input_folder", str(saved / "step1"), "--output_folder", "{target}", "--inject_missing_state"]
    return command, environment.variables(home)


def _quarter(saved: Path) -> float:
    """Bytes that reading a quarter of every tensor (rows, as FSDP2 divides them) asks of the kernel / bytes needed."""
    view = open_checkpoint(saved)
    assert isinstance(view.files, LocalFiles)
    before, needed = _read_by_process(), 0
    for tensor in view.tensors.values():
        if not tensor.shape:
            continue
        rows = -(-tensor.shape[0] // WORLD)
        start = min(rows, tensor.shape[0])  # the second rank's
        box = Box((start, *(0,) * (len(tensor.shape) - 1)), (min(rows, tensor.shape[0] - start), *tensor.shape[1:]))
        needed += view.read(tensor.name, box, bytearray(box.elements * tensor.item_bytes))
    return (_read_by_process() - before) / needed


def _read_by_process() -> int:
    """Bytes that this process has asked `read` for."""
    return int(psutil.Process().io_counters().read_chars)


def _seconds(work: Callable[[], object]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def _timed(command: Sequence[str], env: dict[str, str] | None = None) -> tuple[float, int]:
    """Seconds, and the peak of the process's resident memory as it was last seen."""
    _settle()
    with tempfile.TemporaryDirectory(dir=environment.CACHE) as folder, tempfile.TemporaryFile() as output:
        filled = [part.format(target=f"{folder}/target") for part in command]
        began = time.perf_counter()
        with subprocess.Popen(filled, env=env, stdout=output, stderr=subprocess.STDOUT) as process:
            peak = _Peak(process.pid)
            process.wait()
            seconds = time.perf_counter() - began
            peak.stop()
        if process.returncode:
            output.seek(0)
            raise RuntimeError(f"{' '.join(filled)} failed:\n{output.read().decode()[-2000:]}")
        os.sync()  # nobody pays for another's dirty pages
    return seconds, peak.bytes


def _settle() -> None:
    """Fill as much of the page cache as a run will, so that none is the first to touch memory of a virtual machine."""
    with tempfile.TemporaryFile(dir=environment.CACHE) as scratch:
        block = bytes(16 << 20)
        for _ in range(SETTLE_BYTES // len(block)):
            scratch.write(block)


class _Peak:
    """Reads the kernel's own mark of the peak ten times a second: more often would slow down what it measures."""

    def __init__(self, pid: int) -> None:
        self.bytes = 0
        self._status = Path(f"/proc/{pid}/status")
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()

    def stop(self) -> None:
        self._done.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._done.wait(0.1):
            try:
                lines = self._status.read_text().splitlines()
            except OSError:
                return
            marks = [line.split()[1] for line in lines if line.startswith("VmHWM:")]
            self.bytes = int(marks[0]) * 1024 if marks else self.bytes


def _run(command: Sequence[str], env: dict[str, str] | None = None) -> None:
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} failed:\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}")


if __name__ == "__main__":
    print(json.dumps(measure(), indent=2))
