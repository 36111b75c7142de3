"""How long the accelerator waits for a slow grader: rows graded as they end, and all afterwards.

``python benchmarks/grading.py`` samples long-tailed lengths (log-normal, mean a quarter of the
longest) with the tiny model of this package. The grader sleeps, so long that all responses together
take ``--share`` of the time that sampling takes. Prints JSON, medians of ``--repeats``.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np

from echorl_jax.data import encode_prompt, load_rows, load_tokenizer
from echorl_jax.data.tokens import BUILTIN
from echorl_jax.evaluation.grading import Grading, grade_rollouts
from echorl_jax.models import load_model
from echorl_jax.rewards import GraderPool
from echorl_jax.rollout import Finished, generate


def sleep(response: str, row: Mapping[str, Any]) -> float:
    """The grader; pools name it ``grading:sleep``."""
    time.sleep(row["seconds"])
    return float(len(response) % 2)


def seconds(work: Callable[[], Any]) -> tuple[float, Any]:
    begin = time.perf_counter()
    result = work()
    return time.perf_counter() - begin, result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--prompts", type=int, default=32)
    parser.add_argument("--group", type=int, default=8)
    parser.add_argument("--longest", type=int, default=1024)
    parser.add_argument("--slots", type=int, default=64)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--share", type=float, default=0.5)
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()

    tokenizer = load_tokenizer("builtin:countdown")
    model, params = load_model(BUILTIN["builtin:countdown"], dtype="float32")
    rows = list(load_rows(f"countdown:count={options.prompts}"))
    prompts = [encode_prompt(tokenizer, row, "chat") for row in rows]
    count = options.prompts * options.group
    drawn = np.random.default_rng(0).lognormal(np.log(options.longest / 4) - 0.32, 0.8, count)
    limits = np.clip(drawn, 1, options.longest).astype(int).tolist()

    def sample(finished: Finished | None = None) -> Any:
        rollouts = generate(
            model,
            params,
            prompts,
            jax.random.key(0),
            group_size=options.group,
            max_new_tokens=options.longest,
            row_limits=limits,
            eos_ids=(),
            slots=options.slots,
            finished=finished,
        )
        return jax.device_get(rollouts)

    sample(lambda places, completions: None)  # compiles
    alone = statistics.median(seconds(sample)[0] for _ in range(options.repeats))
    each = alone * options.share * options.workers / count
    judged = [{"seconds": each} for _ in rows]
    found: dict[str, list[float]] = {
        "afterwards": [],
        "as_they_end": [],
        "sampling": [],
    }
    with GraderPool("grading:sleep", workers=options.workers) as grader:
        grader.grade(["ready"] * options.workers, [{"seconds": 0.5}] * options.workers)
        for _ in range(options.repeats):
            rollouts = sample()
            grading = Grading(
                [row for row in judged for _ in range(options.group)],
                tokenizer=tokenizer,
                grader=grader,
            )
            took, _ = seconds(lambda grading=grading: sample(grading.take))
            found["sampling"].append(took)
            took, early = seconds(grading.result)
            found["as_they_end"].append(took)
            took, late = seconds(
                lambda rollouts=rollouts: grade_rollouts(
                    rollouts, judged, tokenizer=tokenizer, grader=grader
                )
            )
            found["afterwards"].append(took)
            assert early == late
    medians = {name: statistics.median(values) for name, values in found.items()}
    hidden = 1 - medians["as_they_end"] / medians["afterwards"]
    print(
        json.dumps(
            {
                "sampling_s": round(alone, 2),
                "sampling_while_grading_s": round(medians["sampling"], 2),
                "waiting_s": {
                    "afterwards": round(medians["afterwards"], 3),
                    "as_they_end": round(medians["as_they_end"], 3),
                },
                "hidden": round(hidden, 3),
                "options": vars(options),
            },
            indent=2,
        )
    )


if __name__ == "__main__":
    main()
