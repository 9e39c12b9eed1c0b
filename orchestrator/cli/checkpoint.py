"""`regrow checkpoint inspect|verify`."""

from __future__ import annotations

import json as jsonlib
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import App, Parameter

from orchestrator.cli.options import Json

if TYPE_CHECKING:
    from orchestrator.checkpoint.formats.native import UniversalView

Location = Annotated[str, Parameter(help="A checkpoint (step-00000040-gen-0003), or the folder of them: its newest.")]

app = App(name="checkpoint", help="Inspect or verify a checkpoint.", help_format="plaintext")


@app.command
def inspect(path: Location, /, *, json: Json = False) -> None:
    """Show what a checkpoint holds, from its manifests alone.

    Example: regrow checkpoint inspect runs/gpt-1/checkpoints
    """
    from orchestrator.checkpoint.formats.native import open_view

    root, name = _located(path)
    view = open_view(root, name)
    if json:
        print(jsonlib.dumps({"path": str(root / name)} | _data(view)))
    else:
        _show(root / name, view)


@app.command
def verify(path: Location, /, *, json: Json = False) -> None:
    """Read every byte of a checkpoint and compare it with its checksums (exit code 3 if it is corrupt).

    Example: regrow checkpoint verify runs/gpt-1/checkpoints/step-00000040-gen-0003
    """
    from orchestrator.checkpoint import verify as verification

    root, name = _located(path)
    found = verification.verify(root, name)
    if json:
        data = {"path": str(root / name), "bytes": found.bytes, "seconds": found.seconds, "tensors": found.tensors}
        print(jsonlib.dumps(data))
    else:
        print(f"{root / name} is whole: {found.tensors} tensors, {found.bytes} bytes in {found.seconds:.2f} s")


def _located(path: str) -> tuple[Path, str]:
    """Root and name; raises `CheckpointError` when there is no committed checkpoint."""
    from orchestrator.checkpoint.manifest import parse_directory_name
    from orchestrator.checkpoint.root import parse_root
    from orchestrator.checkpoint.store import latest
    from orchestrator.core.errors import CheckpointError

    where = parse_root(path)
    if parse_directory_name(where.name) is not None:
        return where.parent, where.name
    newest = latest(where)
    if newest is None:
        raise CheckpointError(
            f"{where} holds no committed checkpoint: give the folder that a job's checkpoint.uri names"
        )
    return where, newest.path


def _data(view: UniversalView) -> dict[str, Any]:
    tensors = [
        {"name": one.name, "kind": one.kind, "dtype": one.dtype, "shape": list(one.shape), "chunks": len(one.chunks)}
        for one in view.tensors.values()
    ]
    size_bytes = sum(one.size_bytes for one in view.tensors.values())
    head = {"step": view.step, "generation": view.generation, "bytes": size_bytes}
    return head | {"tensors": tensors, "state": view.state}


def _show(path: Path, view: UniversalView) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for column in ("tensor", "kind", "dtype", "shape", "chunks"):
        table.add_column(column, overflow="fold")
    for one in view.tensors.values():
        shape = " x ".join(map(str, one.shape)) or "scalar"
        table.add_row(one.name, one.kind, one.dtype, shape, str(len(one.chunks)))
    size_bytes = sum(one.size_bytes for one in view.tensors.values())
    print(f"{path}: step {view.step} of generation {view.generation}, {len(view.tensors)} tensors, {size_bytes} bytes")
    Console().print(table)
