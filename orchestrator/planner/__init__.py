"""Pure: search over legal meshes, cost and memory models, assignment of ranks to nodes.

`plan(spec, capacity, previous)` answers which mesh the job takes on the nodes it may use now, and why. Same input, same
answer, whatever the order of the nodes; `ladder` plans for losses ahead of them. `legality` says what may be, `space`
enumerates it as arrays, `transformer` counts parameters and floating-point operations, `memory` and `cost` estimate,
`judge` applies them to a job on a pool of nodes, `frontier` keeps the fastest plans, `ready` those of searches made
ahead, `choose` decides, `shares` divides the batch, `assign` puts ranks on nodes, `learn` corrects estimates by the
steps that a job reports, `explain` and `shortage` find the words.
"""

from orchestrator.planner.calibration import Calibration
from orchestrator.planner.learn import learn
from orchestrator.planner.outcome import Candidate, Infeasible, Planned, Rejection
from orchestrator.planner.ready import Ready
from orchestrator.planner.search import ladder, plan

__all__ = ["Calibration", "Candidate", "Infeasible", "Planned", "Ready", "Rejection", "ladder", "learn", "plan"]
