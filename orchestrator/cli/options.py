"""Options that several commands share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

Json = Annotated[bool, Parameter(negative="", help="Print the result as JSON.")]
Url = Annotated[str | None, Parameter(help="Address of the controller; else REGROW_URL, else http://127.0.0.1:7470.")]
TokenFile = Annotated[Path | None, Parameter(help="File with the token; else REGROW_TOKEN or REGROW_TOKEN_FILE.")]
JobFile = Annotated[Path, Parameter(help="The job file.")]
JobName = Annotated[str | None, Parameter(help="The job; else the only one.")]
Node = Annotated[str, Parameter(help="The node.")]
