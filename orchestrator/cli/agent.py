"""`regrow agent`: becomes `python -m agents`, which has the flags."""

from __future__ import annotations

import os
import sys
from typing import NoReturn


def agent(*arguments: str) -> NoReturn:
    """Run the agent of one node in this process; see `regrow agent --help` for its flags.

    Example: REGROW_TOKEN=... regrow agent --controller http://10.0.0.1:7470 --node node-1
    """
    os.execv(sys.executable, [sys.executable, "-m", "agents", *arguments])  # noqa: S606 - no shell is wanted
