"""Several processes as one run: where each stands, how they meet, how one's end ends them all.

Nothing here imports JAX: the supervisor of a training process stays small, and is still there to
say what happened when the runtime underneath has aborted.
"""

from echorl_jax.cluster.place import Place, find_place
from echorl_jax.cluster.supervisor import Limits, handling, supervise
from echorl_jax.cluster.wire import Assignment, Secret, assignment, follow_supervisor, tell

__all__ = [
    "Assignment",
    "Limits",
    "Place",
    "Secret",
    "assignment",
    "find_place",
    "follow_supervisor",
    "handling",
    "supervise",
    "tell",
]
