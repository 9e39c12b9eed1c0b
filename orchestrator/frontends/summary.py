"""What a local run came to: incidents, and how far it differs from an undisturbed one."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from orchestrator import ledger
from orchestrator.core.errors import JobFailed
from orchestrator.core.status import STAGES, IncidentStatus, Phase
from orchestrator.frontends.local import Run
from orchestrator.frontends.view import plan_text

TOLERANCE = 1e-5
"""Largest relative difference of a loss that passes for rounding."""
EXIT_DIFFERS = 8
"""Exit code of a compared run whose losses or samples differ."""


@dataclass(frozen=True, slots=True)
class Compared:
    """A run beside the undisturbed one."""

    difference: ledger.Comparison
    steps: int
    """Steps whose losses both know."""
    run_steps: int
    undisturbed_steps: int

    @property
    def equal(self) -> bool:
        """True when every step of both was compared, and nothing but rounding differs."""
        found = self.difference
        whole = self.steps == self.run_steps == self.undisturbed_steps > 0
        return whole and found.max_loss_difference <= TOLERANCE and found.samples_lost == found.samples_repeated == 0

    @property
    def sentence(self) -> str:
        """What the comparison says."""
        if self.equal:
            return (
                f"all {self.steps} losses equal those of the undisturbed run (largest relative difference "
                f"{self.difference.max_loss_difference:.1e}), no sample was lost or repeated"
            )
        found = self.difference
        return (
            f"the run differs from the undisturbed one: largest relative difference of a loss "
            f"{found.max_loss_difference:.1e} (allowed {TOLERANCE:.0e}), {found.samples_lost} samples lost, "
            f"{found.samples_repeated} repeated, {self.steps} losses compared over {self.run_steps} and "
            f"{self.undisturbed_steps} steps"
        )


def compare(run: Run, undisturbed: Run) -> Compared:
    """Compare the ledgers of two runs."""
    ours, theirs = ledger.effective(run.ledger), ledger.effective(undisturbed.ledger)
    known = [step for step in ours.keys() & theirs.keys() if None not in (ours[step].loss, theirs[step].loss)]
    return Compared(ledger.compare(ours, theirs), len(known), len(ours), len(theirs))


def verdict(run: Run, compared: Compared | None) -> tuple[int, str]:
    """Exit code and the sentence for standard error; both empty when all is well."""
    status = run.status
    if status.phase is not Phase.SUCCEEDED:
        reason = status.failure.reason if status.failure is not None else status.reason
        return JobFailed.exit_code, f"job {status.name} ended as {status.phase} at step {status.step}: {reason}"
    if compared is not None and not compared.equal:
        return EXIT_DIFFERS, compared.sentence
    return 0, ""


def summarize(run: Run, compared: Compared | None, report: str) -> dict[str, Any]:
    """The result as data: what `--json` prints."""
    status = run.status
    found = compared.difference if compared is not None else None
    difference = found.max_loss_difference if found is not None else None
    return {
        "job": status.name,
        "phase": str(status.phase),
        "step": status.step,
        "loss": status.loss if status.loss is not None and math.isfinite(status.loss) else None,
        "generations": status.generation,
        "duration_s": round(run.duration_s, 3),
        "incidents": [_incident(one) for one in status.incidents],
        "faults": [{"fault": one.text, "time_s": round(one.time_s, 3), "step": one.step} for one in run.injected],
        "faults_never_due": list(run.never),
        "max_loss_difference": difference if difference is not None and math.isfinite(difference) else None,
        "samples_lost": found.samples_lost if found is not None else None,
        "samples_repeated": found.samples_repeated if found is not None else None,
        "compared_steps": compared.steps if compared is not None else None,
        "equal": compared.equal if compared is not None else None,
        "failure": _failure(run),
        "directory": str(run.directory),
        "report": report,
    }


def _incident(one: IncidentStatus) -> dict[str, Any]:
    return {
        "number": one.number,
        "cause": one.cause,
        "from": plan_text(one.from_plan, one.from_nodes),
        "to": plan_text(one.to_plan, one.to_nodes),
        "reason": one.reason,
        "decision": one.decision,
        "stages_s": {stage: round(one.stages_s[stage], 4) for stage in STAGES if stage in one.stages_s},
        "recovery_s": round(one.recovery_s, 4),
        "lost_steps": one.lost_steps,
        "over": one.closed_s is not None,
    }


def _failure(run: Run) -> dict[str, Any] | None:
    failure = run.status.failure
    if failure is None:
        return None
    return {"reason": failure.reason, "node": failure.node, "rank": failure.rank, "traceback": failure.traceback}
