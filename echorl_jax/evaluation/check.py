"""``echorl check``: what would go wrong with a config's data, before any accelerator time."""

import itertools
import json
from collections.abc import Mapping, Sequence
from typing import Any

from echorl_jax.config import Config
from echorl_jax.data import encode_prompt, load_rows, load_tokenizer
from echorl_jax.rewards import GraderPool


def check(config: Config, *, rows: int, show: int) -> bool:
    """Prints findings on ``data.train`` and ``data.eval``; True when nothing is wrong.

    Raises:
      UserError: data, tokenizer or grader that cannot be used.
    """
    tokenizer = load_tokenizer(config.model.path)
    fine, sets = True, {}
    with GraderPool(
        config.data.grader,
        workers=config.data.grader_workers,
        timeout_s=config.data.grader_timeout_s,
    ) as grader:
        for name, spec in (("train", config.data.train), ("eval", config.data.eval)):
            if not spec:
                continue
            loaded = load_rows(spec, on_bad_row=config.data.on_bad_row)
            sets[name] = list(itertools.islice(loaded, rows))
            print(f"{name}: {len(loaded)} rows, {len(sets[name])} looked at ({spec})")
            for line in loaded.bad[:5]:
                print(f"  left out: {line}")
            prompts = [encode_prompt(tokenizer, row, config.data.template) for row in sets[name]]
            fine &= _check_lengths(prompts, config.data.max_prompt_tokens)
            fine &= _check_grader(grader, sets[name])
            for ids in prompts[:show]:
                print(f"  prompt of {len(ids)} tokens: {tokenizer.decode(ids)!r}")
                print(f"    {tokenizer.convert_ids_to_tokens(ids)}")
    if len(sets) == 2:
        fine &= _check_overlap(sets["train"], sets["eval"])
    print("nothing wrong found" if fine else "something is wrong, see above")
    return fine


def _check_lengths(prompts: Sequence[Sequence[int]], longest: int) -> bool:
    lengths = sorted(map(len, prompts))
    over = sum(length > longest for length in lengths)
    middle = lengths[len(lengths) // 2] if lengths else 0
    print(
        f"  prompts: median {middle}, longest {lengths[-1] if lengths else 0} tokens; "
        f"{over} over data.max_prompt_tokens = {longest} will be left out"
    )
    return over < len(lengths)


def _check_grader(grader: GraderPool, rows: Sequence[Mapping[str, Any]]) -> bool:
    """Gold answers must be right, those of the next row wrong (unless they happen to fit)."""
    gold = [(_gold(row), row) for row in rows]
    known = [(text, row) for text, row in gold if text is not None]
    if not known:
        print("  grader: no gold answers in these rows, nothing to check it with")
        return True
    texts, judged = [text for text, _ in known], [row for _, row in known]
    right = grader.grade(texts, judged)
    shifted = grader.grade(texts[1:] + texts[:1], judged)
    accepted = sum(verdict.correct for verdict in right)
    confused = sum(verdict.correct for verdict in shifted)
    print(
        f"  grader: {accepted} of {len(known)} gold answers right, "
        f"{confused} of {len(known)} answers to another row right"
    )
    for verdict, text in zip(right, texts, strict=True):
        if not verdict.correct:
            print(f"  gold answer refused: {verdict.reason}: {text[:80]!r}")
            break
    return accepted == len(known) and (confused < len(known) / 2 or len(known) == 1)


def _gold(row: Mapping[str, Any]) -> str | None:
    """What a right response would be: the expert's, or a text that ends in the answer."""
    target = row.get("target")
    if isinstance(target, Sequence) and not isinstance(target, str) and target:
        return str(target[-1]["content"])
    if isinstance(row.get("answer"), str):
        return row["answer"]
    truth = row["reward_model"]["ground_truth"]
    return f"\\boxed{{{truth}}}" if isinstance(truth, str) else None


def _check_overlap(
    train: Sequence[Mapping[str, Any]], held_out: Sequence[Mapping[str, Any]]
) -> bool:
    seen = {json.dumps(row["prompt"], sort_keys=True) for row in train}
    both = sum(json.dumps(row["prompt"], sort_keys=True) in seen for row in held_out)
    print(f"overlap: {both} of {len(held_out)} evaluation prompts are among the training prompts")
    return both == 0
