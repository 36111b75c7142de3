"""One process of a run, as a program: supervises the commands that a test gives it.

usage: one_process.py PORT PROCESSES PROCESS FACTS_JSON LIMITS_JSON -- COMMAND...
"""

import json
import os
import sys
from pathlib import Path

from echorl_jax.cluster import Limits, Place, Secret, supervise
from echorl_jax.errors import RunStopped, UserError


def main() -> int:
    port, processes, process, facts, limits = sys.argv[1:6]
    place = Place(f"127.0.0.1:{port}", int(processes), int(process))
    try:
        return supervise(
            place,
            sys.argv[7:],
            facts=json.loads(facts),
            limits=Limits(**json.loads(limits)),
            secret=Secret.find(os.environ, Path(os.environ.get("ECHORL_TEST_DIRECTORY", "unused"))),
        )
    except (UserError, RunStopped) as error:
        print(error, file=sys.stderr)
        return 2 if isinstance(error, UserError) else 1


if __name__ == "__main__":
    sys.exit(main())
