"""``echorl evaluate``: a model on benchmark rows, with every generation kept."""

import collections
import contextlib
import dataclasses
import itertools
import json
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax

from echorl_jax.data import (
    Prompt,
    Template,
    encode_rows,
    load_rows,
    load_tokenizer,
    number_prompts,
    require_embedded_rows,
    require_vocabulary,
)
from echorl_jax.data.pictures import Processor, make_processor
from echorl_jax.data.tokens import keep_date
from echorl_jax.environment import MOST_SAMPLES, JaxEngine, end_settings
from echorl_jax.errors import UserError, writing
from echorl_jax.evaluation.evaluate import Attempt, attempt_prompts
from echorl_jax.evaluation.generations import (
    STARTED,
    claim,
    digest_rows,
    fingerprint,
    first_start,
    read_outcomes,
)
from echorl_jax.evaluation.presets import Pass, passes, preset
from echorl_jax.evaluation.progress import EvaluationProgress
from echorl_jax.evaluation.table import SourceResult, print_results, summarise
from echorl_jax.files import cut_torn_line, model_path, replace_json, sole_writer
from echorl_jax.models import load_model, read_config
from echorl_jax.parallel import is_first, make_mesh, on_first, require_same, texts_from_shares
from echorl_jax.rewards import GraderPool
from echorl_jax.rewards.loading import grading_failed
from echorl_jax.rollout import Resources, Sampling

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclasses.dataclass(frozen=True)
class Benchmark:
    """The options of an evaluation."""

    model: str
    data: str
    adapter: str | None = None  # PEFT directory; None is none
    grader: str = "auto"
    grader_kwargs: str | None = None
    success_threshold: float | None = None
    samples: str = "1"
    temperature: float | None = None  # None: greedy for one sample, else 0.6
    greedy: bool = False
    top_p: float = 1.0
    max_new_tokens: int = 1024
    max_prompt_tokens: int = 2048
    min_pixels: int = 3136
    max_pixels: int = 1003520
    max_image_tokens: int = 1280
    limit: int = 0
    template: str = "chat"
    template_kwargs: str | None = None
    system_prompt: str | None = None
    stop_ids: tuple[int, ...] | None = None
    stop_strings: str | None = None
    dtype: str = "bfloat16"
    seed: int = 0
    batch: int = 256
    slots: int = 0
    workers: int = 2
    devices: int = 0
    tensor: int = 1

    @property
    def prompts(self) -> Template:
        """The template that makes prompts of rows."""
        return Template(self.template, self.template_kwargs or "{}", self.system_prompt)

    @classmethod
    def of(cls, *, preset_name: str, given: Mapping[str, Any]) -> "Benchmark":
        """Defaults, then the preset's settings, then what is given; None is not given."""
        chosen = {name: value for name, value in given.items() if value is not None}
        return cls(**{**preset(preset_name), **chosen}).validated()

    def validated(self) -> "Benchmark":
        """Checks the options; returns them unchanged.

        Raises:
          UserError: the first option out of its range.
        """
        least_one = "max_new_tokens max_prompt_tokens min_pixels max_pixels max_image_tokens"
        rules = [(name, 1) for name in (*least_one.split(), "batch", "tensor")]
        rules += [(name, 0) for name in ("limit", "slots", "workers", "devices")]
        for name, least in rules:
            if (value := vars(self)[name]) < least:
                raise UserError(f"--{name}={value}: must be at least {least}")
        if self.temperature is not None and not 0 <= self.temperature < float("inf"):
            raise UserError(f"--temperature={self.temperature}: must be 0 (greedy) or above")
        if self.max_pixels < self.min_pixels:
            raise UserError(f"--max_pixels={self.max_pixels}: below --min_pixels={self.min_pixels}")
        if not 0 < self.top_p <= 1:
            raise UserError(f"--top_p={self.top_p}: must be in (0, 1]")
        return self


# These change how fast the numbers come, not what they are.
FREE = ("batch", "slots", "workers", "devices", "tensor", "model", "data", "limit")


@dataclasses.dataclass(frozen=True)
class _Work:
    """The rows that are tried, and in which passes."""

    tokenizer: "PreTrainedTokenizerBase"
    processor: Processor | None  # of a model with a vision tower
    prompts: Sequence[Prompt]  # numbered by their places in the data
    passes: Sequence[Pass]
    left_out: int  # rows whose prompts are too long
    bad: int  # rows that could not be read
    digest: str  # tells these rows and prompts from others

    @property
    def temperature(self) -> float:
        """Of the samples; 0 where every attempt is greedy."""
        return max(each.temperature for each in self.passes)

    @property
    def attempts(self) -> int:
        return sum(each.attempts for each in self.passes)

    def order(self) -> Iterator[tuple[int, int, bool]]:
        """(problem, sample, greedy) of every attempt, as they are written."""
        for each in self.passes:
            for i, sample in itertools.product(each.places, range(each.samples)):
                yield self.prompts[i].index, sample, each.temperature == 0


def run_benchmark(options: Benchmark, out: Path) -> dict[str, SourceResult]:
    """Writes ``options.json``, ``generations.jsonl`` and ``scores.json`` and prints a table.

    Attempts that ``generations.jsonl`` holds already are not made again. Several processes share
    each call's rows; the first of them reads and writes the files.

    Returns:
      The results per data source; none but on the first process.

    Raises:
      UserError: model, rows or options that cannot be used; ``out`` holds another evaluation.
    """
    if options.devices and jax.process_count() > 1:
        raise UserError(f"--devices={options.devices}: several processes use all their devices")
    if options.devices > jax.device_count():
        raise UserError(f"--devices={options.devices}: there are {jax.device_count()}")
    own = first_start(out) if is_first() else ""
    started = texts_from_shares([own], jax.process_count(), most_bytes=32)[0]
    work = _prepare(options, datetime.fromisoformat(started))
    path = model_path(options.model)
    file, order = out / "generations.jsonl", list(work.order())
    with contextlib.ExitStack() as held:
        done = on_first(lambda: _take_up(options, work, path, file, order, held, started))
        if done < len(order):
            with writing(file):
                _generate(options, work, path, file, done=done)
    if not is_first():
        return {}
    outcomes = list(read_outcomes(file, order))
    results = summarise(outcomes)
    ungraded = sum(grading_failed(outcome.reason) for outcome in outcomes)
    unjudged = sum(outcome.correct is None for outcome in outcomes)
    document = {
        "options": {**vars(options), "temperature": work.temperature},
        "left_out": work.left_out,
        "bad_rows": work.bad,
        "ungraded": ungraded,
        "unjudged": unjudged,
        "scores": {name: result.as_json() for name, result in results.items()},
    }
    with writing(out / "scores.json"):
        replace_json(out / "scores.json", document)
    print_results(results, left_out=work.left_out, bad=work.bad, unjudged=unjudged)
    if ungraded:
        print(
            f"{ungraded} of {len(outcomes)} attempts count as wrong because their grading failed; "
            f"reasons are in {file}"
        )
    return results


def _take_up(
    options: Benchmark,
    work: _Work,
    path: str,
    file: Path,
    order: Sequence[tuple[int, int, bool]],
    held: contextlib.ExitStack,
    started: str,
) -> int:
    """Claims the folder until the stack is closed, or finds the same evaluation in it.

    Returns:
      How many attempts it holds.
    """
    try:
        with writing(file.parent):
            held.enter_context(sole_writer(file.parent))
    except OSError as error:
        raise UserError(f"{file.parent}: {error.strerror}") from error
    settled = {name: value for name, value in vars(options).items() if name not in FREE}
    adapter = fingerprint(Path(options.adapter)) if options.adapter else None
    weights = {"weights": fingerprint(Path(path)), "adapter_weights": adapter}
    identity = {"model": options.model, **weights, **settled, "rows": work.digest}
    claim(file.parent, {**identity, STARTED: started})
    done = cut_torn_line(file)
    if done > len(order):
        raise UserError(f"{file}: {done} attempts, expected at most {len(order)}")
    if done:
        collections.deque(read_outcomes(file, order), maxlen=0)  # that they are its attempts
    return done


def _prepare(options: Benchmark, started: datetime) -> _Work:
    """Reads the rows. A date in a chat template is that of the evaluation's first start."""
    tokenizer = load_tokenizer(options.model)
    keep_date(tokenizer, started)
    loaded = load_rows(options.data)
    rows = list(itertools.islice(loaded, options.limit or None))
    path = model_path(options.model)
    processor = make_processor(
        read_config(path).vision,
        min_pixels=options.min_pixels,
        max_pixels=options.max_pixels,
        most_tokens=options.max_image_tokens,
    )
    ids = encode_rows(tokenizer, rows, options.prompts, processor, source=options.data)
    prompts = number_prompts(rows, ids, processor, longest=options.max_prompt_tokens)
    if not prompts:
        raise UserError(f"no prompt is within --max_prompt_tokens={options.max_prompt_tokens}")
    kept = [prompt.row for prompt in prompts]
    plan = passes(
        [row["data_source"] for row in kept],
        samples=options.samples,
        temperature=options.temperature,
        greedy=options.greedy,
    )
    if max(each.samples for each in plan) > MOST_SAMPLES:
        raise UserError(f"--samples={options.samples}: at most {MOST_SAMPLES}")
    digest = digest_rows([prompt.ids for prompt in prompts], kept)
    require_same({f"rows under --data={options.data}": digest})
    return _Work(
        tokenizer=tokenizer,
        processor=processor,
        prompts=[dataclasses.replace(prompt, number=prompt.index) for prompt in prompts],
        passes=plan,
        left_out=len(rows) - len(prompts),
        bad=len(loaded.bad),
        digest=digest,
    )


def _generate(options: Benchmark, work: _Work, path: str, file: Path, *, done: int) -> None:
    """Appends the attempts that are missing, each as soon as it is graded."""
    devices = jax.devices()[: options.devices or None]
    mesh = make_mesh(tensor=options.tensor, devices=devices) if len(devices) > 1 else None
    model, params = load_model(
        path,
        dtype=options.dtype,
        param_dtype=options.dtype,
        remat="none",
        mesh=mesh,
        layout="rollout",
        adapter=options.adapter or "",
    )
    require_vocabulary(work.tokenizer, model.config.vocab_size)
    require_embedded_rows(
        work.tokenizer,
        [prompt.row for prompt in work.prompts],
        template=options.prompts,
        vocab_size=model.config.vocab_size,
        experts=False,
        source=options.data,
        processor=work.processor,
    )
    longest = max(len(prompt.ids) for prompt in work.prompts)
    warning = model.config.warn_of_positions(longest, options.max_new_tokens)
    if warning and is_first():
        print(f"echorl: {warning}", file=sys.stderr)
    with (
        GraderPool(
            options.grader,
            kwargs=json.loads(options.grader_kwargs or "{}"),
            success_threshold=options.success_threshold,
            workers=options.workers,
        ) as grader,
        (file if is_first() else Path(os.devnull)).open("a", encoding="utf-8") as lines,
        EvaluationProgress(work.attempts, done=done) as shown,
    ):
        for each in work.passes:
            skipped, done = min(done, each.attempts), max(0, done - each.attempts)
            if skipped == each.attempts:
                continue
            prompts = [work.prompts[i] for i in each.places]
            engine = JaxEngine(
                model,
                Resources(slots=options.slots, mesh=mesh),
                prompt_tokens=max(len(prompt.ids) for prompt in prompts),
                image_tokens=options.max_image_tokens,
            )
            sampling = Sampling(
                group_size=each.samples,
                max_new_tokens=options.max_new_tokens,
                temperature=each.temperature,
                top_p=options.top_p if each.temperature else 1.0,
                **end_settings(
                    work.tokenizer,
                    model,
                    tuple(options.stop_ids or ()),
                    tuple(json.loads(options.stop_strings or "[]")),
                ),
            )
            for attempt in attempt_prompts(
                engine,
                params,
                prompts,
                jax.random.key(options.seed),
                sampling=sampling,
                tokenizer=work.tokenizer,
                grader=grader,
                rows_at_once=options.batch,
                done=skipped,
                progress=shown.look,
            ):
                line = _line(attempt, prompts[attempt.problem], greedy=not each.temperature)
                lines.write(json.dumps(line) + "\n")
                lines.flush()
                shown.attempt(attempt.data_source)


def _line(attempt: Attempt, prompt: Prompt, *, greedy: bool) -> dict[str, Any]:
    row = prompt.row
    return {
        "problem": prompt.index,
        "sample": attempt.sample,
        "greedy": greedy,
        "data_source": attempt.data_source,
        "prompt": row["prompt"],
        "ground_truth": row["reward_model"]["ground_truth"],
        "response": attempt.response,
        **attempt.verdict.as_json(),
        "tokens": len(attempt.ids),
        "truncated": attempt.truncated,
    }
