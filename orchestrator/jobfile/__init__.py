"""The job file: one schema for the YAML given to the CLI, the body of `POST /v1/jobs` and the CRD's `spec`.

`text` reads YAML and JSON, `fields` holds the kinds of value (durations, sizes), `schema` the keys, `huggingface` reads
a `config.json`, `problems` turns what does not fit into one sentence, `resolve` makes the core's `JobSpec` of it and
`dump` writes one back. Every function raises `InvalidInput` and nothing else.

What `auto` stands for: `checkpoint.interval` = what loses least (Daly 2006) by the measured cost of a save and rate of
failures, within 10 s and 1 h or the bounds given; `recovery.hangAfter` = ten times the median step, at least 30 s;
`recovery.waitForReplacement` = as long as waiting is worth more than training on what is left; `nodes.devices` and
`hardware.device` = what the nodes report; `batch.micro` = the planner's choice.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from orchestrator.core.errors import InvalidInput
from orchestrator.core.spec import JobSpec
from orchestrator.jobfile.dump import dump
from orchestrator.jobfile.problems import validate
from orchestrator.jobfile.resolve import resolve
from orchestrator.jobfile.schema import TrainingJob
from orchestrator.jobfile.text import LIMIT_BYTES, read_mapping

__all__ = ["dump", "load", "parse", "schema"]


def load(path: Path) -> JobSpec:
    """The job that the file at `path` describes; paths in it are relative to its folder."""
    try:
        with path.open("rb") as file:
            content = file.read(LIMIT_BYTES + 1)
    except OSError as error:
        raise InvalidInput(f"cannot read job file {path}: {error.strerror or error}; check the path") from error
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        message = f"{path}: not UTF-8 text (byte {error.start}); give a job file in YAML, saved as UTF-8"
        raise InvalidInput(message) from error
    return parse(text, path.parent, source=str(path))


def parse(text: str, base: Path, source: str = "job description") -> JobSpec:
    """The job that `text` (YAML or JSON) describes; paths in it are relative to the folder `base`.

    `source` is what error messages call the text.
    """
    mapping = read_mapping(text, source)
    return resolve(validate(mapping, source), base.absolute(), source)


def schema() -> dict[str, Any]:
    """JSON schema of the job file."""
    return TrainingJob.model_json_schema(by_alias=True)
