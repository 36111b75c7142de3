"""``echorl evaluate``: a model on benchmark rows, with every generation kept."""

import dataclasses
import itertools
import json
from pathlib import Path

import jax
from rich import box
from rich.console import Console
from rich.table import Table

from echorl_jax.data import encode_prompt, load_rows, load_tokenizer
from echorl_jax.data.tokens import BUILTIN
from echorl_jax.errors import UserError
from echorl_jax.evaluation.evaluate import Attempt, attempt_rows, end_tokens
from echorl_jax.evaluation.scores import Score, score_by_source
from echorl_jax.models import load_model
from echorl_jax.rewards import GraderPool


@dataclasses.dataclass(frozen=True)
class Benchmark:
    """What to evaluate, and how."""

    model: str
    data: str
    grader: str = "auto"
    samples: int = 1
    temperature: float | None = None  # None: greedy for one sample, else 0.6
    top_p: float = 1.0
    max_new_tokens: int = 1024
    max_prompt_tokens: int = 2048
    limit: int = 0
    template: str = "chat"
    dtype: str = "bfloat16"
    batch: int = 256
    workers: int = 2
    seed: int = 0


def run_benchmark(options: Benchmark, out: Path) -> dict[str, Score]:
    """Writes ``generations.jsonl`` and ``scores.json`` and prints a table.

    Raises:
      UserError: model, rows or options that cannot be used.
    """
    if options.samples < 1 or options.batch < 1 or options.max_new_tokens < 1:
        raise UserError("--samples, --batch and --max_new_tokens must be at least 1")
    temperature = options.temperature
    if temperature is None:
        temperature = 0.0 if options.samples == 1 else 0.6
    tokenizer = load_tokenizer(options.model)
    rows = list(itertools.islice(load_rows(options.data), options.limit or None))
    prompts = [encode_prompt(tokenizer, row, options.template) for row in rows]
    fits = [i for i, ids in enumerate(prompts) if len(ids) <= options.max_prompt_tokens]
    if not fits:
        raise UserError(f"no prompt is within --max_prompt_tokens={options.max_prompt_tokens}")
    model, params = load_model(
        str(BUILTIN.get(options.model, options.model)), dtype=options.dtype, remat="none"
    )
    out.mkdir(parents=True, exist_ok=True)
    console = Console(stderr=True)
    attempts: list[Attempt] = []
    with (
        GraderPool(options.grader, workers=options.workers) as grader,
        (out / "generations.jsonl").open("w") as file,
        console.status("generating") as status,
    ):
        for attempt in attempt_rows(
            model,
            params,
            [rows[i] for i in fits],
            [prompts[i] for i in fits],
            jax.random.key(options.seed),
            tokenizer=tokenizer,
            grader=grader,
            samples=options.samples,
            max_new_tokens=options.max_new_tokens,
            temperature=temperature,
            eos_ids=end_tokens(tokenizer, model),
            top_p=options.top_p,
            rows_at_once=options.batch,
        ):
            attempts.append(attempt)
            row = rows[fits[attempt.problem]]
            file.write(json.dumps(_line(attempt, fits[attempt.problem], row)) + "\n")
            status.update(f"{len(attempts)} of {len(fits) * options.samples} attempts")
    scores = score_by_source((a.data_source, a.problem, a.verdict.correct) for a in attempts)
    kept = {name: dataclasses.asdict(score) for name, score in scores.items()}
    result = {"options": dataclasses.asdict(options), "left_out": len(rows) - len(fits)}
    (out / "scores.json").write_text(json.dumps({**result, "scores": kept}, indent=2) + "\n")
    # A file or pipe has no width of its own: wide enough that nothing is cut.
    Console(width=max(console.width, 110)).print(_table(scores, attempts))
    return scores


def _line(attempt: Attempt, place: int, row) -> dict:
    return {
        "problem": place,
        "sample": attempt.sample,
        "data_source": attempt.data_source,
        "prompt": row["prompt"],
        "ground_truth": row["reward_model"]["ground_truth"],
        "response": attempt.response,
        **vars(attempt.verdict),
        "tokens": attempt.tokens,
        "truncated": attempt.truncated,
    }


def _table(scores: dict[str, Score], attempts: list[Attempt]) -> Table:
    table = Table(box=box.SIMPLE)
    columns = ("data source", "problems", "samples", "mean", "95%", "pass@k", "tokens", "cut off")
    for name in columns:
        table.add_column(name, justify="left" if name == "data source" else "right", no_wrap=True)
    for source, score in scores.items():
        own = [a for a in attempts if a.data_source == source]
        best = max(score.pass_at)
        table.add_row(
            source,
            str(score.problems),
            str(score.samples),
            f"{score.mean:.3f}",
            f"{score.low:.3f}-{score.high:.3f}",
            f"@{best} {score.pass_at[best]:.3f}" if best > 1 else "",
            f"{sum(a.tokens for a in own) / len(own):.0f}",
            f"{sum(a.truncated for a in own) / len(own):.1%}",
        )
    return table
