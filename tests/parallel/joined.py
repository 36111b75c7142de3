"""A training process in miniature: joins, exchanges, and writes what it got. Run by a test.

usage: joined.py OUT_JSON
"""

import json
import sys
import time
from collections.abc import Callable

import jax
import numpy as np

from echorl_jax.cluster import assignment, follow_supervisor, tell
from echorl_jax.data import PromptStream, encode_prompt, load_rows, load_tokenizer
from echorl_jax.environment import GradedTexts, Grading
from echorl_jax.environment.attempts import _from_all_processes
from echorl_jax.errors import UserError
from echorl_jax.parallel import (
    any_process,
    from_first,
    from_shares,
    is_first,
    join_processes,
    make_mesh,
    on_first,
    own_share,
    place_rows,
    place_whole,
    require_same,
    texts_from_shares,
    wait_for_all,
)
from echorl_jax.rewards import GraderPool, Verdict
from echorl_jax.rewards.loading import MAX_METRICS
from echorl_jax.training.evaluator import attempt


class Counted:
    """Rows that know which of them were read here."""

    def __init__(self, spec: str) -> None:
        self.rows = load_rows(spec)
        self.read: list[int] = []

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int):
        self.read.append(index)
        return self.rows[index]


def exchanges() -> dict:
    """The results of each helper, with 5 things over the processes."""
    place, count = jax.process_index(), 5
    share = own_share(count)
    rows = np.arange(count * 2, dtype=np.int32).reshape(count, 2)
    mesh = make_mesh(data=2, fsdp=-1)
    placed = place_rows(np.arange(8.0, dtype=np.float32), mesh)
    whole = place_whole({"a": np.float32(3)}, mesh)["a"]
    total = jax.jit(lambda x, y: (x * x).sum() + y)(placed, whole)
    wait_for_all("here")
    return {
        "share": [share.start, share.stop],
        "rows": from_shares(rows[share], count).tolist(),
        "texts": texts_from_shares(["", "a", "ßß", "d" * 9, "e"][share], count, most_bytes=4),
        "any": [any_process(place == 1), any_process(False)],
        "first": is_first(),
        "from_first": from_first(10 + place),
        "on_first": on_first(lambda: 20 + place),
        "refused": refused(lambda: on_first(lambda: look(place))),
        "differ": refused(lambda: require_same({"rows": "one", "weights": str(place)})),
        "total": float(total),
        "on": sorted({d.process_index for d in placed.sharding.device_set}),
    }


def look(place: int) -> int:
    """An error that only process 0 raises."""
    raise UserError(f"process {place}: no such place")


def refused(work: Callable[[], object]) -> str:
    """The line of the error that the work raises."""
    try:
        return str(work())
    except UserError as error:
        return str(error)


def stream() -> dict:
    """Two steps, a third after a restart; and which rows this process has read."""
    rows, tokenizer = Counted("countdown:count=12"), load_tokenizer("builtin:countdown")
    lengths = sorted(len(encode_prompt(tokenizer, row, "chat")) for row in rows.rows)
    # A third of the rows is too long.
    settings = {"prompts_per_step": 4, "seed": 0, "max_prompt_tokens": lengths[7]}
    first = PromptStream(rows, tokenizer, **settings)
    steps = [next(first), next(first)]
    read = list(rows.read)
    again = PromptStream(rows, tokenizer, **settings)
    again.set_state(first.get_state())
    steps.append(next(again))
    return {
        "ids": [[prompt.ids for prompt in step] for step in steps],
        "index": [[prompt.index for prompt in step] for step in steps],
        "truth": [p.row["reward_model"]["ground_truth"]["target"] for p in steps[0]],
        "too_long": again.too_long,
        "read": read,
        "state": again.get_state(),
    }


def verdicts() -> dict:
    """Six completions graded against three rows; all get all verdicts, some decode."""
    with GraderPool("countdown", workers=0) as grader:
        graded = grade(grader)
    # As much as a verdict may hold.
    full = {f"{i}".rjust(40, "x"): -(0.1**300) / 3 for i in range(MAX_METRICS + 1)}
    mine = [Verdict(None, None, "not judged", {"a": 0.1}), Verdict(0.1, True, "", full)] * 2
    exchanged = _from_all_processes(mine[own_share(4)], 4)
    return {
        "verdicts": [[v.score, v.correct, v.reason] for v in graded.verdicts],
        "unjudged": [[v.score, v.correct, v.reason, v.metrics] for v in exchanged],
        "decoded": [bool(text) for text in graded.responses],
        "groups": by_groups(),
    }


def by_groups() -> list[bool | None]:
    """Three groups of two, each judged as a whole: right is the shorter one."""
    rows = [
        {"number": n // 2, "prompt": [], "reward_model": {"ground_truth": ""}} for n in range(6)
    ]
    with GraderPool("tests.rewards.hostile_graders:trl_shortest", workers=1) as grader:
        tokenizer = load_tokenizer("builtin:countdown")
        grading = Grading(rows, tokenizer=tokenizer, grader=grader, group_size=2)
        for place, length in enumerate([1, 2, 4, 3, 2, 5]):
            grading.take([place], [np.full(length, 5, np.int32)])
        return [verdict.correct for verdict in grading.result().verdicts]


def grade(grader: GraderPool) -> GradedTexts:
    """Six completions of three rows, right and wrong in turn."""
    rows = list(load_rows("countdown:count=3"))
    tokenizer = load_tokenizer("builtin:countdown")
    targets = [row["target"][0]["content"] for row in rows]
    texts = [text for target in targets for text in (target, "no")]
    ids = [np.array(tokenizer.encode(text, add_special_tokens=False)) for text in texts]
    judged = [row for row in rows for _ in range(2)]
    grading = Grading(judged, tokenizer=tokenizer, grader=grader)
    grading.take(range(6), ids)
    return grading.result()


def failures() -> dict:
    """Work that fails in the last process: while it grades, beside the others, without them."""
    last = jax.process_index() == jax.process_count() - 1
    with GraderPool("countdown", workers=0) as grader:
        if last:
            grader.close()
        while_grading = attempt(lambda: grade(grader), name="graded", within_s=30)

    def beside() -> int:
        return jax.process_index() if not last else {}["x"]

    def alone() -> int:
        if last:
            raise OSError("lost")
        time.sleep(3)  # as in a computation in common that the other has left
        return 1

    told = [while_grading, attempt(beside, name="beside", within_s=30)]
    told.append(attempt(lambda: 7, name="fine", within_s=30))
    try:
        raised = str(attempt(alone, name="alone", within_s=1))
    except (OSError, RuntimeError) as error:
        raised = f"{type(error).__name__}: {error}"
    return {"told": told, "raised": raised, "after": any_process(last)}


def main() -> None:
    given = assignment()
    if given is not None:
        follow_supervisor(given)
        try:
            join_processes(
                given.coordinator,
                processes=given.processes,
                process=given.process,
                start_timeout_s=given.start_timeout_s,
                lost_after_s=given.lost_after_s,
            )
        except UserError as error:
            tell(str(error), certain=True)
            raise SystemExit(2) from error
    found = {"exchanges": exchanges(), "stream": stream(), "verdicts": verdicts()}
    found["failures"] = failures()
    with open(sys.argv[1], "w") as file:
        json.dump(found, file)


if __name__ == "__main__":
    main()
