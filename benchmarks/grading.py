"""How long the accelerator waits for a slow grader: rows graded as they end, and all afterwards.

``python benchmarks/grading.py`` samples long-tailed lengths (log-normal, mean a quarter of the
longest) with the tiny model of this package. The grader sleeps, so long that all responses together
take ``--share`` of the time that sampling takes. Prints JSON, medians of ``--repeats``.
"""

import argparse
import functools
import json
import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np

from echorl_jax.data import encode_prompt, load_rows, load_tokenizer
from echorl_jax.data.tokens import BUILTIN
from echorl_jax.environment import GradedTexts, Grading
from echorl_jax.models import load_model
from echorl_jax.rewards import GraderPool
from echorl_jax.rollout import Finished, generate
from echorl_jax.types import Rollouts


def sleep(response: str, row: Mapping[str, Any]) -> float:
    """The grader; pools name it ``grading:sleep``."""
    time.sleep(row["seconds"])
    return float(len(response) % 2)


def seconds(work: Callable[[], Any]) -> tuple[float, Any]:
    begin = time.perf_counter()
    result = work()
    return time.perf_counter() - begin, result


def sampler(
    options: argparse.Namespace, tokenizer: Any, rows: list[dict[str, Any]]
) -> Callable[..., Any]:
    """Samples the same rollouts at each call, handing rows to its argument as they end."""
    model, params = load_model(BUILTIN["builtin:countdown"], dtype="float32")
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

    return sample


def grade(grading: Grading, rollouts: Rollouts) -> GradedTexts:
    """All at once, when all are there."""
    ended = zip(rollouts.completion_ids, rollouts.completion_length, strict=True)
    completions = [ids[:length] for ids, length in ended]
    grading.take(range(len(completions)), completions)
    return grading.result()


def measure(options: argparse.Namespace) -> dict[str, float]:
    """Medians in seconds: sampling alone, sampling while grading, and the wait for the grader."""
    tokenizer = load_tokenizer("builtin:countdown")
    rows = list(load_rows(f"countdown:count={options.prompts}"))
    sample = sampler(options, tokenizer, rows)
    sample(lambda places, completions: None)  # compiles
    alone = statistics.median(seconds(sample)[0] for _ in range(options.repeats))
    each = alone * options.share * options.workers / (options.prompts * options.group)
    judged = [{"seconds": each}] * (options.prompts * options.group)
    found: dict[str, list[float]] = {"afterwards": [], "as_they_end": [], "sampling": []}
    with GraderPool("grading:sleep", workers=options.workers) as grader:
        grader.grade(["ready"] * options.workers, [{"seconds": 0.5}] * options.workers)
        for _ in range(options.repeats):
            rollouts = sample()
            grading, other = (Grading(judged, tokenizer=tokenizer, grader=grader) for _ in "12")
            found["sampling"].append(seconds(lambda take=grading.take: sample(take))[0])
            took, early = seconds(grading.result)
            found["as_they_end"].append(took)
            took, late = seconds(functools.partial(grade, other, rollouts))
            found["afterwards"].append(took)
            assert early == late
    return {"alone": alone} | {name: statistics.median(took) for name, took in found.items()}


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
    took = measure(options)
    result = {
        "sampling_s": round(took["alone"], 2),
        "sampling_while_grading_s": round(took["sampling"], 2),
        "waiting_s": {name: round(took[name], 3) for name in ("afterwards", "as_they_end")},
        "hidden": round(1 - took["as_they_end"] / took["afterwards"], 3),
        "options": vars(options),
    }
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
