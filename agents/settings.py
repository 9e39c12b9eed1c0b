"""What an agent is started with: flags, token, folder; checked before anything is started."""

from __future__ import annotations

import argparse
import re
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import Distribution, distributions
from pathlib import Path
from typing import NoReturn

from orchestrator.core.errors import InvalidInput

PRELOAD = "orchestrator.trainer.preload"
"""Module that the warm process imports besides torch, and whose `preload()` it calls if there is one: what training
scripts would import and do for the first time is done once, before they are forked."""
TOKEN_VARIABLE = "REGROW_TOKEN"  # noqa: S105  # the name of a variable
"""Environment variable with the token; training scripts do not get to see it."""
RACK_VARIABLE = "REGROW_RACK"
"""Environment variable with the rack, where no flag says it."""
SPEED_VARIABLE = "REGROW_SPEED"
"""Environment variable with the speed, where no flag says it."""
_NAME = r"[A-Za-z0-9][A-Za-z0-9._-]{0,252}"


@dataclass(frozen=True, slots=True)
class Settings:
    """A checked configuration."""

    controller: str
    node: str
    devices: int
    address: str
    runtime_dir: Path
    token: str
    preload: str | None
    parent: int | None
    rack: str
    """Empty = not known."""
    speed: float
    """Of its devices, relative to what their kind usually does."""


class _Parser(argparse.ArgumentParser):
    """Raises instead of printing the usage."""

    def error(self, message: str) -> NoReturn:
        raise InvalidInput(f"regrow agent: {message} (see --help)")


def parse(argv: Sequence[str], environment: Mapping[str, str]) -> Settings:
    """Settings from flags and environment; raises InvalidInput, one sentence, when they do not do."""
    options = _parser().parse_args(argv)
    if not re.fullmatch(r"https?://[^/\s]+/?", options.controller):
        raise InvalidInput(f"--controller must look like http://HOST:PORT, not {options.controller!r}")
    if not re.fullmatch(_NAME, options.node):
        raise InvalidInput(f"--node must be a name of letters, digits, '.', '_' and '-', not {options.node!r}")
    token = _token(options.token_file, environment)
    return Settings(
        controller=options.controller,
        node=options.node,
        devices=_devices(options.devices),
        address=options.address,
        runtime_dir=_runtime_dir(options.runtime_dir, options.node),
        token=token,
        preload=options.preload or None,
        parent=options.parent,
        rack=_rack(options.rack, environment),
        speed=_speed(options.speed, environment),
    )


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="regrow agent",
        description="Run the agent of one node: it connects to the controller and runs the workers assigned to it.",
        epilog=f"Example: {TOKEN_VARIABLE}=... regrow agent --controller http://10.0.0.1:8080 --node node-0",
        allow_abbrev=False,
    )
    parser.add_argument("--controller", required=True, metavar="URL", help="http://HOST:PORT of the controller")
    parser.add_argument("--node", required=True, metavar="NAME", help="name of this node, unique in the cluster")
    parser.add_argument("--devices", default="auto", metavar="N", help="devices to offer; auto = one CPU slot")
    parser.add_argument(
        "--rack", metavar="NAME", help=f"rack that the node stands in (default: {RACK_VARIABLE}, else not known)"
    )
    parser.add_argument(
        "--speed",
        metavar="S",
        help=f"0.7 for a node throttled to that share of its kind's speed (default: {SPEED_VARIABLE}, else 1)",
    )
    parser.add_argument("--address", default="127.0.0.1", help="address at which other nodes reach this one")
    parser.add_argument(
        "--runtime-dir", type=Path, metavar="DIR", help="folder for logs and sockets; a new one in /tmp"
    )
    parser.add_argument(
        "--token-file", type=Path, metavar="FILE", help=f"file with the token, instead of {TOKEN_VARIABLE}"
    )
    parser.add_argument("--preload", default=PRELOAD, metavar="MODULE", help="import this once for all workers")
    parser.add_argument("--parent", type=int, metavar="PID", help="die with this parent process")
    return parser


def _devices(text: str) -> int:
    if text == "auto":
        return 1
    if not text.isdigit() or int(text) < 1:
        raise InvalidInput(f"--devices must be a number of at least 1 or 'auto', not {text!r}")
    return int(text)


def _rack(given: str | None, environment: Mapping[str, str]) -> str:
    rack = environment.get(RACK_VARIABLE, "").strip() if given is None else given
    if rack and not re.fullmatch(_NAME, rack):
        source = RACK_VARIABLE if given is None else "--rack"
        raise InvalidInput(f"{source} must be a name of letters, digits, '.', '_' and '-', not {rack!r}")
    return rack


def _speed(given: str | None, environment: Mapping[str, str]) -> float:
    text = environment.get(SPEED_VARIABLE, "").strip() if given is None else given
    if not text:
        return 1.0
    if not re.fullmatch(r"(0?\.[0-9]+|1(\.0*)?)", text) or not float(text):
        source = SPEED_VARIABLE if given is None else "--speed"
        raise InvalidInput(f"{source} must be a number above 0 and up to 1, such as 0.7, not {text!r}")
    return float(text)


def _token(path: Path | None, environment: Mapping[str, str]) -> str:
    if path is None:
        token = environment.get(TOKEN_VARIABLE, "").strip()
        source = TOKEN_VARIABLE
    else:
        try:
            token = path.read_text().strip()
        except (OSError, UnicodeDecodeError) as error:
            raise InvalidInput(f"the token file {path} cannot be read: {error}") from error
        source = str(path)
    if not token:
        raise InvalidInput(f"there is no token in {source}: set {TOKEN_VARIABLE} or give --token-file")
    if not token.isascii() or not token.isprintable() or " " in token:
        raise InvalidInput(f"the token in {source} has characters that no token has: give the controller's token")
    return token


def _runtime_dir(path: Path | None, node: str) -> Path:
    try:
        if path is None:
            return Path(tempfile.mkdtemp(prefix=f"regrow-{node[:32]}-"))
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path):
            return path.resolve()
    except OSError as error:
        raise InvalidInput(
            f"the runtime folder {path} cannot be used ({error.strerror}): give another one with --runtime-dir"
        ) from error


def check_import_name() -> None:
    """Another public distribution is also imported as `agents`; raises InvalidInput when it is installed, too."""
    others = sorted({found.name for found in distributions() if found.name != "regrow" and _provides_agents(found)})
    if others:
        raise InvalidInput(
            f"the distribution {', '.join(others)} also provides the import name 'agents', which regrow's agent needs: "
            "install regrow into an environment of its own"
        )


def _provides_agents(distribution: Distribution) -> bool:
    declared = distribution.read_text("top_level.txt")
    if declared is not None and "agents" in declared.split():
        return True
    return "\nagents/" in "\n" + (distribution.read_text("RECORD") or "")
