"""``echorl check``: what would go wrong with a config's data, before any accelerator time."""

import itertools
import json
import statistics
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from echorl_jax.config import Config, ConfigError
from echorl_jax.core import load_objective
from echorl_jax.data import (
    Rows,
    Template,
    encode_rows,
    encode_target,
    expert_text,
    load_rows,
    load_tokenizer,
    require_embedded_rows,
    require_vocabulary,
)
from echorl_jax.data.pictures import Processor, configured_processor, narrowed, pictures_of
from echorl_jax.evaluation.contamination import find_overlap
from echorl_jax.files import model_path
from echorl_jax.models import read_config
from echorl_jax.models.config import VisionConfig
from echorl_jax.rewards import GRADERS, GraderPool, grading_failed, mean_metrics
from echorl_jax.rewards.mathematics import second_spelling

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Rows of each set that are compared with the other's.
COMPARED = 200_000
# Rows that are named of each kind of finding.
NAMED = 10
# Characters that are shown of the end of a text.
SHOWN = 80
# A verdict that takes longer would make an accelerator wait (seconds).
SLOW_S = 1.0
# A problem that is nearly in both sets counts as wrong from this share of its n-grams on.
WRONG_SHARE = 0.8


def check(config: Config, *, rows: int, show: int) -> bool:
    """Prints findings on ``data.train`` and ``data.eval``; True when nothing is wrong.

    Raises:
      UserError: data, tokenizer or grader that cannot be used.
    """
    tokenizer = load_tokenizer(model_path(config.model.path, config.model.revision))
    vocab_size, vision = _check_model(config, tokenizer)
    processor = configured_processor(config, vision)
    try:
        experts = config.objective.expert_rows
        objective = load_objective(config.objective.name, expert_rows=experts)
    except ValueError as error:
        raise ConfigError(f"config.objective.name: {error}") from error
    needed = objective.supervised or objective.expert_rows > 0
    learns_from_experts = needed or objective.hints
    wrong, sets = list[str](), dict[str, Rows]()
    template = Template.of(config.data)
    with GraderPool.of(config) as grader:
        known = all(entry.path in GRADERS for entry in grader.entries if entry.decides)
        for name, spec in (("train", config.data.train), ("eval", config.data.eval)):
            if not spec:
                continue
            loaded = load_rows(spec, on_bad_row=config.data.on_bad_row)
            sets[name] = loaded
            seen = list(itertools.islice(loaded, rows))
            print(f"{name}: {len(loaded)} rows, {len(seen)} looked at ({spec})")
            if loaded.bad:
                print(f"  left out: {len(loaded.bad)} bad rows")
            for line in loaded.bad[:NAMED]:
                print(f"  left out: {line}")
            require_embedded_rows(
                tokenizer,
                seen,
                template=template,
                vocab_size=vocab_size,
                experts=learns_from_experts and name == "train",
                source=f"data.{name}",
                processor=processor,
            )
            prompts = encode_rows(tokenizer, seen, template, processor, source=f"data.{name}")
            if not _check_lengths(prompts, config.data.max_prompt_tokens):
                wrong.append(f"{name}: no prompt is short enough")
            if name == "train" and learns_from_experts:
                if not _check_experts(config, tokenizer, seen) and needed:
                    wrong.append(f"{name}: {config.objective.name} needs expert texts")
            least = config.objective.success_threshold
            if not _check_grader(grader, seen, least, tokenizer):
                wrong.append(f"{name}: grader and gold answers disagree")
            if not _check_spellings(grader, seen) and known:
                wrong.append(f"{name}: gold answers are right in one spelling only")
            _check_stops(json.loads(config.rollout.stop_strings), seen)
            for ids, row in zip(prompts[:show], seen, strict=False):
                _show(tokenizer, ids, row, processor)
    if len(sets) == 2 and not _check_overlap(sets["train"], sets["eval"]):
        wrong.append("overlap: evaluation problems are among the training problems")
    print("\n".join(f"wrong: {what}" for what in wrong) or "nothing wrong found")
    return not wrong


def _show(
    tokenizer: "PreTrainedTokenizerBase",
    ids: Sequence[int],
    row: Mapping[str, Any],
    processor: Processor | None,
) -> None:
    """Prints a prompt; of pictures their sizes and numbers of tokens in place of the tokens."""
    pictures = [] if processor is None else pictures_of(row)
    tokens = [] if processor is None else [processor.tokens(picture) for picture in pictures]
    shown = list(ids) if processor is None else narrowed(ids, processor.image_id)
    print(f"  prompt of {len(ids)} tokens: {tokenizer.decode(shown)!r}")
    for number, (picture, count) in enumerate(zip(pictures, tokens, strict=True), start=1):
        size = f"{picture.width} x {picture.height} pixels"
        print(f"    picture {number}: {size}, {count} tokens")
    print(f"    {tokenizer.convert_ids_to_tokens(shown)}")


def _check_model(
    config: Config, tokenizer: "PreTrainedTokenizerBase"
) -> tuple[int, VisionConfig | None]:
    """The size of the model's vocabulary, the tokenizer's where there is no ``config.json``, and
    its vision tower.
    """
    path = Path(model_path(config.model.path, config.model.revision))
    if not (path / "config.json").is_file():
        return 1 + max(tokenizer.get_vocab().values()), None
    shape = read_config(path)
    require_vocabulary(tokenizer, shape.vocab_size)
    if max(config.rollout.stop_ids, default=0) >= shape.vocab_size:
        raise ConfigError(
            f"config.rollout.stop_ids = {config.rollout.stop_ids}: the vocabulary has ids from 0 "
            f"to {shape.vocab_size - 1}"
        )
    lengths = config.data.max_prompt_tokens, config.rollout.max_new_tokens
    if warning := shape.warn_of_positions(*lengths):
        print(warning)
    return shape.vocab_size, shape.vision


def _check_lengths(prompts: Sequence[Sequence[int]], longest: int) -> bool:
    lengths = sorted(map(len, prompts))
    over = sum(length > longest for length in lengths)
    middle = lengths[len(lengths) // 2] if lengths else 0
    print(
        f"  prompts: median {middle}, longest {lengths[-1] if lengths else 0} tokens; "
        f"{over} over data.max_prompt_tokens = {longest} will be left out"
    )
    return over < len(lengths)


def _check_grader(
    grader: GraderPool,
    rows: Sequence[Mapping[str, Any]],
    threshold: float | None,
    tokenizer: "PreTrainedTokenizerBase",
) -> bool:
    """Gold answers must be right, those of the next row wrong (unless they happen to fit)."""
    gold = [(_gold(row), row) for row in rows]
    known = [(text, row) for text, row in gold if text is not None]
    if not known:
        print("  grader: no gold answers in these rows, nothing to check it with")
        return True
    texts, judged = [text for text, _ in known], [row for _, row in known]
    start = time.perf_counter()
    ids = [tokenizer.encode(text, add_special_tokens=False) for text in texts]
    right = grader.grade(texts, judged, ids)
    shifted = grader.grade(texts[1:] + texts[:1], judged, ids[1:] + ids[:1])
    mean_s = (time.perf_counter() - start) / (2 * len(known))
    accepted = sum(bool(verdict.correct) for verdict in right)
    confused = sum(bool(verdict.correct) for verdict in shifted)
    unjudged = sum(not verdict.judged for verdict in right)
    print(
        f"  grader: {accepted} of {len(known)} gold answers right, "
        f"{confused} of {len(known)} answers to another row right"
    )
    if unjudged:
        print(f"  grader: {unjudged} gold answers not judged, it returned None for them")
    for name, score in mean_metrics(verdict.metrics for verdict in right).items():
        print(f"  grader: {name} is {score:g} on average for gold answers")
    refused = [
        (verdict, text, row["reward_model"]["ground_truth"])
        for verdict, (text, row) in zip(right, known, strict=True)
        if verdict.correct is False
    ]
    for verdict, text, truth in refused[:NAMED]:
        end = repr(text) if len(text) <= SHOWN else f"...{text[-SHOWN:]!r}"
        print(f"  gold answer refused: {verdict.reason}: {end} for {str(truth)[:SHOWN]!r}")
    if len(refused) > NAMED:
        print(f"  gold answer refused: {len(refused) - NAMED} more")
    if any(verdict.score for verdict, _, _ in refused):
        least = "1" if threshold is None else f"objective.success_threshold = {threshold:g}"
        print(
            f"  grader: a plain score below {least} is no success, whatever reward it gives; "
            "set config.objective.success_threshold to the least score of a success"
        )
    failed = [verdict for verdict in (*right, *shifted) if grading_failed(verdict.reason)]
    if failed:
        print(f"  grader: {len(failed)} verdicts failed, the first: {failed[0].reason}")
    if mean_s > SLOW_S:
        print(f"  grader: slow, {mean_s:.1f} s for a verdict; see config.data.grader_workers")
    told_apart = confused < len(known) / 2 or len(known) == 1
    return not failed and not refused and accepted > 0 and told_apart


def _check_spellings(grader: GraderPool, rows: Sequence[Mapping[str, Any]]) -> bool:
    """Gold answers that can be written in another way must be right in that way too."""
    golds = [(row["reward_model"]["ground_truth"], row) for row in rows]
    texts = [(second_spelling(gold) if isinstance(gold, str) else None, row) for gold, row in golds]
    known = [(text, row) for text, row in texts if text is not None]
    verdicts = grader.grade([f"\\boxed{{{text}}}" for text, _ in known], [row for _, row in known])
    refused = [pair for pair, v in zip(known, verdicts, strict=True) if v.correct is False]
    if known:
        accepted = sum(bool(verdict.correct) for verdict in verdicts)
        print(f"  grader: {accepted} of {len(known)} right in a second spelling")
    for text, row in refused[:NAMED]:
        gold = row["reward_model"]["ground_truth"]
        print(f"  second spelling refused: {text[:SHOWN]!r} for {gold[:SHOWN]!r}")
    return not refused


def _check_stops(stops: Sequence[str], rows: Sequence[Mapping[str, Any]]) -> None:
    """Names the right responses that no policy could write, for they go on after a stop string."""
    texts = [text for row in rows if (text := _gold(row)) is not None]
    cut = [text for text in texts if any(stop in text.removesuffix(stop) for stop in stops)]
    if stops:
        print(f"  stop strings: {len(cut)} of {len(texts)} gold answers go on after one")


def _gold(row: Mapping[str, Any]) -> str | None:
    """A right response: the expert's, or a text that ends in the answer."""
    if (text := expert_text(row)) is not None:
        return text
    truth = row["reward_model"]["ground_truth"]
    return f"\\boxed{{{truth}}}" if isinstance(truth, str) else None


def _check_experts(
    config: Config, tokenizer: "PreTrainedTokenizerBase", rows: Sequence[Mapping[str, Any]]
) -> bool:
    """Rows must have the expert text that the objective learns from; its length in tokens."""
    lengths = [len(encode_target(tokenizer, row)) for row in rows if expert_text(row)]
    missing, longest = len(rows) - len(lengths), config.rollout.max_new_tokens
    print(f"  expert texts: {len(lengths)} of {len(rows)} rows have one", end="")
    if lengths:
        cut = sum(length > longest for length in lengths)
        middle = statistics.median_low(lengths)
        print(f", median {middle}, longest {max(lengths)} tokens; ", end="")
        print(f"{cut} over rollout.max_new_tokens = {longest} will be cut", end="")
    print()
    return not missing


def _check_overlap(train: Rows, held_out: Rows) -> bool:
    """Problems of the held-out set that are in the training set too, word for word or nearly."""
    compared = [
        [_problem(row) for row in itertools.islice(rows, COMPARED)] for rows in (train, held_out)
    ]
    found = find_overlap(*compared)
    same = [overlap for overlap in found if overlap.same]
    print(
        f"overlap: {len(same)} of {len(compared[1])} evaluation problems are among the "
        f"{len(compared[0])} training problems, {len(found) - len(same)} nearly"
    )
    others = sorted((overlap for overlap in found if not overlap.same), key=lambda o: -o.share)
    for each in [*same[:NAMED], *others[:NAMED]]:
        how = "is" if each.same else f"has {each.share:.0%} of its n-grams in"
        print(f"  evaluation row {each.held_out} {how} training row {each.train}")
    if (unnamed := max(len(same) - NAMED, 0) + max(len(others) - NAMED, 0)) > 0:
        print(f"  and {unnamed} more")
    return not any(overlap.share >= WRONG_SHARE for overlap in found)


def _problem(row: Mapping[str, Any]) -> str:
    """The problem's own text, without a prompt's frame where the row has it apart."""
    truth = row["reward_model"]["ground_truth"]
    if isinstance(truth, Mapping) and isinstance(truth.get("question"), str):
        return truth["question"]  # UFT's rows have it in a frame elsewhere
    own = next((row[name] for name in ("problem", "question") if row.get(name)), None)
    users = [message["content"] for message in row["prompt"] if message["role"] == "user"]
    return own if isinstance(own, str) else "\n".join(users)
