"""What a test asks for: every checkpoint that was made, with the live state of the run that made it.

    from tests.peers import data

    case = data.checkpoint("z3-bf16-w4-tied")
    case.root                    # what save_checkpoint was given; case.directory is root / tag
    live = case.live()           # "master/<name>", "state/exp_avg/<name>", "weight/<name>", "buffer/...", "frozen/..."
    known = case.known()         # "scalars" {"step": {name: 3.0}}, "groups" [{"names", "hyper"}], "aliases", ...
    case.universal()             # folder that DeepSpeed's own converter wrote, or None; case.conversion_error says why

Made on demand, a whole launch at a time, and kept under `~/.cache/regrow` until a pin or a maker's source changes.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
import tempfile
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from safetensors.torch import load_file

from tests.peers import environment
from tests.peers.cases import RUNS, Run, launches

HERE = Path(__file__).parent
SOURCES = ("cases.py", "deepspeed_live.py", "deepspeed_maker.py", "deepspeed_models.py", "deepspeed_parallel.py")
LAUNCH_TIMEOUT_S = 3600
LOG_TAIL_CHARS = 6000


@dataclass(frozen=True)
class Checkpoint:
    """One checkpoint that a real run saved."""

    run: Run
    home: Path

    @property
    def name(self) -> str:
        return self.run.name

    @property
    def about(self) -> str:
        return self.run.about

    @property
    def world(self) -> int:
        return self.run.world

    @property
    def root(self) -> Path:
        """The folder that save_checkpoint was given; it holds `latest`."""
        return self.home / "checkpoint"

    @property
    def tag(self) -> str:
        return (self.root / "latest").read_text().strip()

    @property
    def directory(self) -> Path:
        return self.root / self.tag

    def live(self) -> dict[str, Any]:
        """Tensors of the engine when it saved, unsharded, under `<what>/<parameter>`."""
        return load_file(self.home / "live.safetensors")

    def known(self) -> dict[str, Any]:
        """What is not a tensor: scalars, groups, aliases, steps, client state."""
        found: dict[str, Any] = json.loads((self.home / "live.json").read_text())
        return found

    @property
    def conversion_error(self) -> str:
        """What DeepSpeed's own converter failed with; empty when it did not."""
        return str(json.loads((self.home / "universal.json").read_text()).get("error", ""))

    @property
    def conversion_wrong(self) -> list[str]:
        """Keys of the live state that DeepSpeed's own converter left out or got wrong without saying so."""
        found: list[str] = json.loads((self.home / "universal.json").read_text()).get("wrong", [])
        return found

    def universal(self) -> Path | None:
        """What DeepSpeed's own converter wrote. That it wrote something does not make it right."""
        return None if self.conversion_error else self.home / "universal" / self.tag


def checkpoint(name: str) -> Checkpoint:
    run = RUNS[name]
    return Checkpoint(run, _made(run.launch) / name)


def checkpoints() -> dict[str, Checkpoint]:
    """All of them, by name."""
    return {name: checkpoint(name) for name in RUNS}


def identity() -> str:
    """Changes when what is made could change."""
    parts = [environment.pins().encode(), *((HERE / name).read_bytes() for name in SOURCES)]
    return hashlib.sha256(b"\0".join(parts)).hexdigest()[:12]


@cache
def _made(launch: str) -> Path:
    """The launch's folder; made when it is missing."""
    home = environment.CACHE / f"deepspeed-checkpoints-{identity()}" / launch
    with environment.locked(home):
        if not home.exists():
            unfinished = home.with_name(f"{home.name}.unfinished")
            shutil.rmtree(unfinished, ignore_errors=True)
            unfinished.mkdir(parents=True)
            options = ("--launch", launch, "--out", str(unfinished))
            _torchrun("deepspeed_maker", launches()[launch][0].world, options, unfinished / "log.txt")
            unfinished.rename(home)
    return home


def resume(name: str, root: Path, world: int, steps: int = 3, extra: tuple[str, ...] = ()) -> list[float]:
    """Losses of DeepSpeed going on with the model of run `name` from a universal checkpoint (its own form) at `root`.

    `root` holds `latest_universal`; `extra` are further options of `deepspeed_resume`. Raises RuntimeError with what
    DeepSpeed said when it does not go on.
    """
    options = ("--name", name, "--root", str(root), "--steps", str(steps), *extra)
    with tempfile.TemporaryDirectory() as folder:
        printed = _torchrun("deepspeed_resume", world, options, Path(folder) / "log.txt")
    (losses,) = [line.removeprefix("LOSSES ") for line in printed.splitlines() if line.startswith("LOSSES ")]
    return [float(loss) for loss in json.loads(losses)]


def _torchrun(module: str, world: int, options: tuple[str, ...], log: Path) -> str:
    """What the processes printed; it is left in `log`, too."""
    home = environment.deepspeed()
    command = (
        str(home / "bin" / "python"),
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        str(world),
    )
    for _ in range(4):  # one in some forty launches was seen to abort in DeepSpeed's own code, on a busy machine
        with log.open("w") as handle:
            done = subprocess.run(
                (*command, "--module", f"tests.peers.{module}", *options),
                cwd=environment.REPOSITORY,
                env=environment.variables(home),
                stdout=handle,
                stderr=subprocess.STDOUT,
                timeout=LAUNCH_TIMEOUT_S,
                check=False,
            )
        printed = log.read_text(errors="replace")
        if "Signal 6 (SIGABRT)" not in printed:
            break
    if done.returncode:
        raise RuntimeError(f"{module} {' '.join(options)} at world size {world} failed:\n{printed[-LOG_TAIL_CHARS:]}")
    return printed
