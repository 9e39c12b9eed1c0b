"""Pure: search over legal meshes, cost and memory models, assignment of ranks to nodes.

`plan(spec, capacity, previous)` answers which mesh the job takes on the nodes it may use now, and why. Same input, same
answer, whatever the order of the nodes. `legality` says what may be, `batch` how samples are divided, `transformer`
counts parameters and floating-point operations, `memory` and `cost` estimate, `search` enumerates, `choose` decides,
`assign` puts ranks on nodes, `explain` and `shortage` find the words.
"""

from orchestrator.planner.outcome import Candidate, Infeasible, Planned, Rejection
from orchestrator.planner.search import plan

__all__ = ["Candidate", "Infeasible", "Planned", "Rejection", "plan"]
