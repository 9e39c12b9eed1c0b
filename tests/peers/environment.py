"""The virtual environment in which DeepSpeed runs: its own, so that regrow's never holds a peer."""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

CONSTRAINTS = Path(__file__).with_name("constraints.txt")
CACHE = Path(os.environ.get("REGROW_TEST_CACHE", Path.home() / ".cache" / "regrow"))
REPOSITORY = Path(__file__).resolve().parents[2]
BUILD_TIMEOUT_S = 1800


@contextmanager
def locked(target: Path) -> Iterator[None]:
    """Only one process at a time makes `target`."""
    target.parent.mkdir(parents=True, exist_ok=True)
    with target.with_name(f"{target.name}.lock").open("w") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield


def pins() -> str:
    """Names the versions and the interpreter that the environment is made of."""
    return hashlib.sha256(CONSTRAINTS.read_bytes() + sys.version.encode()).hexdigest()[:12]


def variables(home: Path) -> dict[str, str]:
    """Environment variables of a process that runs DeepSpeed, whose first start compiles an operator."""
    if shutil.which("g++") is None:
        raise RuntimeError("DeepSpeed compiles an operator when it starts and found no g++: install a C++ compiler")
    return os.environ | {
        "PATH": f"{home / 'bin'}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": str(REPOSITORY),
        "DS_BUILD_OPS": "0",
        "DS_ACCELERATOR": "cpu",
        "OMP_NUM_THREADS": "1",
        "TORCHELASTIC_ERROR_FILE": os.devnull,
    }


def deepspeed() -> Path:
    """The environment's folder; made when it is missing, which takes minutes."""
    home = CACHE / f"deepspeed-{pins()}"
    with locked(home):
        if not home.exists():
            unfinished = home.with_name(f"{home.name}.unfinished")
            shutil.rmtree(unfinished, ignore_errors=True)
            _build(unfinished)
            unfinished.rename(home)
    return home


def _build(home: Path) -> None:
    _run(sys.executable, "-m", "venv", str(home), env=dict(os.environ))
    install = (str(home / "bin" / "python"), "-m", "pip", "install", "--quiet", "--disable-pip-version-check")
    install += ("--constraint", str(CONSTRAINTS))
    names = ("torch", "numpy", "setuptools", "wheel", "ninja", "py-cpuinfo", "safetensors")
    _run(*install, *names, env=variables(home))
    _run(*install, "--no-build-isolation", "deepspeed", env=variables(home))


def _run(*command: str, env: dict[str, str]) -> None:
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=BUILD_TIMEOUT_S, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} failed:\n{done.stdout}\n{done.stderr}")
