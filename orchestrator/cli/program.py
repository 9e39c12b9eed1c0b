"""The commands put together, and how each of them ends."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

from cyclopts import App, CycloptsError

from orchestrator.cli.agent import agent
from orchestrator.cli.checkpoint import app as checkpoint
from orchestrator.cli.plan import plan
from orchestrator.cli.remote import drain, save, status, stop, submit, undrain
from orchestrator.cli.run import run
from orchestrator.cli.serve import serve
from orchestrator.cli.simulate import simulate
from orchestrator.core.errors import InvalidInput, RegrowError

EXIT_CODES = (
    "Exit codes: 0 success; 1 any other error; 2 wrong input (flag, job file, environment); 3 unreadable or corrupt "
    "checkpoint; 4 conflict (journal, port or job name taken); 5 refused (wrong token); 6 controller unreachable; "
    "7 the job FAILED; 8 losses or samples differ (run --compare); 130 or 143 ended by SIGINT or SIGTERM."
)

COMMANDS = (run, serve, agent, submit, status, drain, undrain, save, stop, plan, simulate)


def create_app() -> App:
    """The command line."""
    app = App(
        name="regrow",
        help="Keeps distributed PyTorch training running on whatever hardware is left.",
        help_epilogue=EXIT_CODES,
        help_format="plaintext",
        version=_version,
        result_action="return_value",
    )
    for command in COMMANDS:
        app.command(command)
    app.command(checkpoint)
    return app


def _version() -> str:
    from importlib.metadata import version

    return version("regrow")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns its exit code. Errors are one sentence on standard error."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    try:
        if given[:1] == ["agent"]:
            agent(*given[1:])
        return create_app()(given, exit_on_error=False, print_error=False) or 0
    except CycloptsError as error:
        return _say(InvalidInput(f"{_one_line(str(error))} (see `regrow {' '.join(_command(given))}--help`)"))
    except RegrowError as error:
        return _say(error)
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except Exception as error:
        if os.environ.get("REGROW_TRACEBACK"):
            raise
        sentence = f"{type(error).__name__}: {_one_line(str(error))}"
        return _say(RegrowError(f"a defect in regrow ({sentence}): run it again with REGROW_TRACEBACK=1 and report it"))


def _say(error: RegrowError) -> int:
    print(f"regrow: {error}", file=sys.stderr)
    return error.exit_code


def _one_line(text: str) -> str:
    return " ".join(text.split())


def _command(given: Sequence[str]) -> list[str]:
    names = {command.__name__ for command in COMMANDS} | {"checkpoint"}
    return [f"{name} " for name in given[:1] if name in names]
