"""Evaluates a model on benchmark rows: greedy pass@1, avg@k and pass@k for each data source.

Writes generations.jsonl (a line per attempt), options.json and scores.json to --out and prints a
table with 95% intervals. After a kill, the same command continues. Several samples need a
temperature above 0; pass@k is the unbiased estimate. --samples=aime*=32,4 makes 32 attempts at rows
whose data source begins with aime and 4 at others; --greedy adds one greedy attempt at each row.

--preset=paper takes the EchoRL authors' settings: temperature 0.6, top_p 1, 8,192 tokens, 32
samples on AIME and AMC and one elsewhere, their system prompt; other options override them.

The same command in several processes is one evaluation, as for train: see docs/launch.md.

examples:
  echorl evaluate --model=builtin:countdown --data="countdown:split=eval&count=512" --out=runs/eval
  echorl evaluate --model=runs/first/export --data=test.parquet --samples=8 --greedy --out=runs/e8
  echorl evaluate --preset=paper --model=models/7b --data=aime.parquet,arc.parquet --out=runs/paper
"""

import argparse
import dataclasses

from echorl_jax.cluster import Limits
from echorl_jax.commands import (
    DTYPES,
    MODEL,
    add_grader,
    bounded,
    location,
    number,
    take_place,
    whole,
    whole_numbers,
)
from echorl_jax.config import JSON_OBJECT, JSON_TEXTS, MeshConfig
from echorl_jax.remote import mirrored


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the options. Their defaults come from the preset, so argparse's are None."""
    add = parser.add_argument
    add("--model", required=True, help=MODEL)
    add("--adapter", metavar="DIR", help="PEFT directory of LoRA weights on top of the model")
    add("--data", required=True, metavar="FILE[,FILE]", help="rows, as config.data.eval")
    add(
        "--out",
        required=True,
        type=location,
        metavar="DIR",
        help="of the results, also s3:// or gs://",
    )
    add("--preset", default="", help="settings by name: paper")
    add_grader(parser, None)
    add("--samples", metavar="K|PATTERN=K,...", help="attempts per row (default 1)")
    add("--temperature", type=number, help="default: greedy for one sample, else 0.6")
    add("--greedy", action="store_true", default=None, help="one greedy attempt per row as well")
    add("--top_p", type=number, help="default 1.0, the whole distribution")
    add("--max_new_tokens", type=whole(1), help="longest completion in tokens (default 1024)")
    add(
        "--max_prompt_tokens",
        type=whole(1),
        help="rows with longer prompts are left out (default 2048)",
    )
    add("--stop_ids", type=whole_numbers, help="tokens that end a completion besides the model's")
    add("--stop_strings", type=bounded(JSON_TEXTS), help="texts that end one, as a JSON list")
    add("--min_pixels", type=whole(1), help="least pixels of a picture, scaled (default 3136)")
    add("--max_pixels", type=whole(1), help="most pixels of a picture, scaled (default 1003520)")
    add(
        "--max_image_tokens",
        type=whole(1),
        help="rows with more image tokens are left out (default 1280)",
    )
    add("--limit", type=whole(), help="only the first rows (default: all)")
    add("--template", help="chat (default), plain, luffy, qwen-math, boxed, uft or a .jinja file")
    add("--template_kwargs", type=bounded(JSON_OBJECT), help="of the chat template, a JSON object")
    add("--system_prompt", help="in place of the rows' own; '' has none")
    add("--dtype", choices=DTYPES, help="weights and compute (default bfloat16)")
    add("--seed", type=whole(), help="of the sampling (default 0)")
    add("--batch", type=whole(1), help="completions in one call of the sampler (default 256)")
    add("--slots", type=whole(), help="completions decoded at once; 0 (default) fits memory")
    add("--workers", type=whole(), help="grading processes (default 2)")
    add("--devices", type=whole(), help="devices to use; 0 (default) is all")
    add("--tensor", type=whole(1), help="devices that share one copy of the weights (default 1)")


def run(arguments: argparse.Namespace) -> int:
    """Evaluates and prints the table."""
    options = {name: value for name, value in vars(arguments).items() if name != "command_line"}
    facts = {f"--{name}": str(value) for name, value in options.items()}
    defaults = MeshConfig()
    limits = Limits(defaults.start_timeout_s, defaults.lost_after_s)
    code = take_place(arguments, facts=facts, limits=limits, directory=arguments.out)
    if code is not None:
        return code
    from echorl_jax.evaluation.benchmark import Benchmark, run_benchmark

    names = [field.name for field in dataclasses.fields(Benchmark)]
    given = {name: options[name] for name in names}
    benchmark = Benchmark.of(preset_name=arguments.preset, given=given)
    with mirrored(arguments.out, periodic=True) as mirror:
        run_benchmark(benchmark, mirror.directory)
    return 0
