"""Tokens per second of the sampler, against its own limit and against other samplers.

Every measurement is a process of its own, and the processes of a case take turns, so that what else
the machine does falls on all alike. Peers run from a directory of programs that is given by
``--peers`` (``rollout_tunix.py``, ``rollout_hf.py``, ``make_model.py``), each with its own
interpreter; a peer without interpreter is left out. All read the same random Qwen2 weights.

    python benchmarks/rollout.py --peers=DIR --models=DIR --tunix-python=PY --torch-python=PY

Prints one JSON object: for each case and engine the median of tokens/s over rounds, seconds, peak
memory, and ratios of medians within this run. Absolute numbers of a shared machine mean little.

Cases: ``fixed`` has 128 new tokens in every row. ``geometric`` takes V / 32 ids as EOS, which with
random weights gives a mean length near 32. ``lognormal`` has given lengths of mean 32 and maximum
128, more rows than slots; the peers' rates there are computed from ``fixed``. ``long`` has 1,024
new tokens. The limit is the time of the decoder's matrix products alone, at the same number of
rows.
"""

import argparse
import json
import resource
import subprocess
import sys
import time
from pathlib import Path
from statistics import median
from typing import Any

from processes import measure

PROMPT, NEW, GROUP, MEAN = 64, 128, 8, 32
PROMPTS = {"tiny": 16, "small": 8}
# case -> (times the prompts, new tokens, slots as a share of rows)
CASES = {
    "fixed": (1, NEW, 1.0),
    "geometric": (1, NEW, 1.0),
    "geometric_large": (4, NEW, 0.25),
    "lognormal": (8, NEW, 0.125),
    "long": (1, 1024, 1.0),
}


def lognormal_lengths(rows: int, longest: int, mean: float) -> list[int]:
    """Long-tailed lengths: sigma 0.8, cut to ``[1, longest]``, the mean restored after the cut."""
    import numpy as np

    draws = np.random.default_rng(0).lognormal(0.0, 0.8, rows)
    low, high = 0.0, float(longest)
    for _ in range(60):  # the scale whose cut mean is `mean`, by bisection
        scale = (low + high) / 2
        short = np.clip(draws * scale, 1, longest).mean() < mean
        low, high = (scale, high) if short else (low, scale)
    return np.clip(draws * scale, 1, longest).astype(int).tolist()


def engine(directory: str, case: str, repeats: int, cpu_workers: int = 0) -> dict[str, Any]:
    """This package's sampler in this process."""
    import jax
    import numpy as np

    from echorl_jax.models import load_model
    from echorl_jax.rollout import Progress, generate

    model, params = load_model(directory, dtype="float32")
    times, new, share = CASES[case]
    prompts = PROMPTS[Path(directory).name] * times
    vocab, rows = model.config.vocab_size, prompts * GROUP
    ids = np.random.RandomState(0).randint(2, vocab, size=(prompts, PROMPT)).tolist()
    settings: dict[str, Any] = {
        "eos_ids": (),
        "slots": int(rows * share),
        "cpu_workers": cpu_workers,
    }
    if case.startswith("geometric"):
        settings["eos_ids"] = range(vocab - vocab // MEAN, vocab)
    if case == "lognormal":
        settings["row_limits"] = lognormal_lengths(rows, new, MEAN)
    last: list[Progress] = []

    def once(seed: int) -> float:
        start = time.perf_counter()
        rollouts = generate(
            model,
            params,
            ids,
            jax.random.key(seed),
            group_size=GROUP,
            max_new_tokens=new,
            progress=last.append,
            **settings,
        )
        jax.device_get(rollouts)
        return time.perf_counter() - start

    first = once(0)
    seconds, tokens, occupancy = [], [], []
    for seed in range(1, repeats + 1):
        seconds.append(once(seed))
        tokens.append(last[-1].tokens)
        occupancy.append(last[-1].occupancy)
    return {
        "seconds": seconds,
        "generated_tokens": tokens,
        "slot_occupancy": round(median(occupancy), 3),
        "first_call_seconds": round(first, 2),
    }


def limit(directory: str, case: str, repeats: int) -> dict[str, Any]:
    """The decoder's matrix products alone, for as many rows as there are slots."""
    import jax
    import jax.numpy as jnp

    from echorl_jax.models import load_model

    model, params = load_model(directory, dtype="float32")
    times, _, share = CASES[case]
    rows, turns = int(PROMPTS[Path(directory).name] * times * GROUP * share), 32
    layers, width = model.layers(params), model.config.hidden_size

    def product(x: jax.Array, matrix: jax.Array) -> jax.Array:
        return x @ matrix.reshape(x.shape[1], -1)

    @jax.jit
    def run(x: jax.Array) -> jax.Array:
        def layer(x: jax.Array, weights: Any) -> tuple[jax.Array, None]:
            attention, mlp = weights["attention"], weights["mlp"]
            q, k, v = (product(x, attention[name]["kernel"]) for name in "qkv")
            keep = (k.sum(1, keepdims=True) + v.sum(1, keepdims=True)) * 1e-9
            out = attention["o"]["kernel"]
            x = q @ out.reshape(-1, width) + keep
            gate, up = (product(x, mlp[name]["kernel"]) for name in ("gate", "up"))
            return (gate + up) @ mlp["down"]["kernel"], None

        def turn(_: int, x: jax.Array) -> jax.Array:
            x, _ = jax.lax.scan(layer, x, layers)
            return x + (x @ model.head(params)).max(1, keepdims=True) * 1e-9

        return jax.lax.fori_loop(0, turns, turn, x)

    x = jax.random.normal(jax.random.key(0), (rows, width), jnp.float32)
    run(x).block_until_ready()
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        run(x).block_until_ready()
        seconds.append(time.perf_counter() - start)
    return {"seconds": seconds, "generated_tokens": [rows * turns] * repeats}


def work(name: str, directory: str, case: str, repeats: int, cpu_workers: int) -> None:
    """One measurement as a line of JSON."""
    from echorl_jax import xla

    xla.set_flags()
    if name == "engine":
        result = engine(directory, case, repeats, cpu_workers)
    else:
        result = limit(directory, case, repeats)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(json.dumps({**result, "peak_rss_mb": round(peak, 1)}))


def commands(args: argparse.Namespace, size: str, case: str) -> dict[str, list[str]]:
    """Who runs in a case, and how."""
    directory = str(Path(args.models) / size)
    itself = [sys.executable, __file__, f"--models={directory}", f"--repeats={args.repeats}"]
    itself.append(f"--cpu_workers={args.cpu_workers}")
    found = {name: [*itself, f"--worker={name}", f"--case={case}"] for name in ("engine", "limit")}
    times, new, _ = CASES[case]
    work = [f"--P={PROMPTS[size] * times}", f"--G={GROUP}", f"--R={new}", f"--reps={args.repeats}"]
    if case.startswith("geometric"):
        work.append(f"--mean-len={MEAN}")
    if case != "lognormal":  # peers have no argument for given lengths
        peers = (("tunix", args.tunix_python), ("hf", args.torch_python))
        for name, python in peers:
            if python:
                program = str(Path(args.peers) / f"rollout_{name}.py")
                found[name] = [python, program, directory, *work]
    return found


def summary(found: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    """Medians over all timed calls of each engine, and ratios of tokens/s."""
    table: dict[str, Any] = {}
    for name, runs in found.items():
        pairs = [
            pair
            for run in runs
            for pair in zip(run["generated_tokens"], run["seconds"], strict=True)
        ]
        if not pairs:
            continue
        table[name] = {
            "calls": len(pairs),
            "tokens_per_second": round(median(tokens / seconds for tokens, seconds in pairs), 1),
            "seconds": round(median(seconds for _, seconds in pairs), 3),
            "peak_rss_mb": max(run["peak_rss_mb"] for run in runs),
        }
        for key in ("slot_occupancy", "first_call_seconds"):
            if key in runs[0]:
                table[name][key] = runs[0][key]
    ours = table.get("engine")
    if ours:
        others = [name for name in table if name != "engine"]
        ratio = {
            name: round(ours["tokens_per_second"] / table[name]["tokens_per_second"], 3)
            for name in others
        }
        table["ratio"] = ratio
    return table


def waiting_rates(fixed: dict[str, Any], size: str) -> dict[str, float]:
    """Tokens/s of the peers on ``lognormal``: they have no argument for given lengths, but decode
    as many rows as in ``fixed`` at the same cost per turn until the longest is done.
    """
    rows = PROMPTS[size] * GROUP
    lengths = lognormal_lengths(rows * CASES["lognormal"][0], NEW, MEAN)
    batches = [lengths[i : i + rows] for i in range(0, len(lengths), rows)]
    share = sum(lengths) / sum(rows * max(batch) for batch in batches)
    return {
        name: round(fixed[name]["tokens_per_second"] * share, 1)
        for name in ("tunix", "hf")
        if name in fixed
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", required=True, help="directory with tiny/ and small/")
    parser.add_argument("--peers", default="", help="directory of the peers' programs")
    parser.add_argument("--tunix-python", default="")
    parser.add_argument("--torch-python", default="")
    parser.add_argument("--sizes", default="tiny,small")
    parser.add_argument("--cases", default=",".join(CASES))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--repeats", type=int, default=2, help="timed calls in a process")
    parser.add_argument(
        "--cpu_workers", type=int, default=0, help="of our sampler (default: it chooses)"
    )
    parser.add_argument("--out", default="", help="file for all measurements, one a line")
    parser.add_argument("--worker", default="", help=argparse.SUPPRESS)
    parser.add_argument("--case", default="", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        return work(args.worker, args.models, args.case, args.repeats, args.cpu_workers)
    results: dict[str, Any] = {}
    for size in args.sizes.split(","):
        if not (Path(args.models) / size / "model.safetensors").exists():
            make = [args.torch_python, str(Path(args.peers) / "make_model.py"), size]
            subprocess.run([*make, str(Path(args.models) / size)], check=True)
        for case in args.cases.split(","):
            programs = commands(args, size, case)
            found: dict[str, list[dict[str, Any]]] = {name: [] for name in programs}
            for _ in range(args.rounds):
                for name, command in programs.items():
                    run = measure(command)
                    if run is None:
                        continue
                    found[name].append(run)
                    if args.out:
                        line = {"size": size, "case": case, "engine": name, **run}
                        with open(args.out, "a") as file:
                            file.write(json.dumps(line) + "\n")
            results.setdefault(size, {})[case] = summary(found)
            print(size, case, json.dumps(results[size][case]), file=sys.stderr, flush=True)
    for size, cases in results.items():
        if {"fixed", "lognormal"} <= cases.keys():
            rates = waiting_rates(cases["fixed"], size)
            ours = cases["lognormal"]["engine"]["tokens_per_second"]
            cases["lognormal"]["computed_for_peers"] = rates
            cases["lognormal"]["ratio"] |= {k: round(ours / v, 3) for k, v in rates.items()}
    small = results.get("small", {})
    long, short = (small.get(case, {}).get("engine") for case in ("long", "fixed"))
    if long and short:
        ratio = short["tokens_per_second"] / long["tokens_per_second"]
        results["cost_per_token_at_1024_over_128"] = round(ratio, 3)
    print(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
