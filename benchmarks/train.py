"""One GRPO update against Tunix's and a torch one on the same weights and the same rollouts.

Every measurement is a process of its own, and they take turns. The peers run from ``--peers``, a
directory with ``train_tunix.py``, ``train_trl_like_torch.py``, ``peerlib.py`` (whose synthetic
rollouts all use) and ``make_model.py``, each with its own interpreter; one without is left out.

    python benchmarks/train.py --peers=DIR --models=DIR --tunix-python=PY --torch-python=PY
    python benchmarks/train.py --peers=DIR --models=DIR --torch-python=PY --lora=8 --repeats=10

With ``--lora=RANK`` it compares, in one process and in turns, an update of all weights with one of
adapters, and sampling from merged weights with sampling with adapters: seconds, and the median
ratio of neighbouring turns with its quartiles, by the clock and by processor time, which other
programs on the machine disturb less.

Without it prints one JSON object: median seconds of a step, peak resident memory, our compiler's
temporary memory, loss and gradient norm of the first step (equal work gives equal numbers), and
ratios of medians within this run. The peers take the 32 rows at once, we in micro-batches of
``--rows``: a chunk of logits is then a whole micro-batch, and what ``--remat`` keeps is kept for
few rows at a time. Cases of ours, all 32 rows of 64 + 128 tokens unless said:

    full        every row whole: what the peers do
    echo        the same with an EchoClip in each group
    long_tail   completion lengths log-normal with mean 32; the peers pad them all to 128
    groups      40 rows
    degenerate  the same, 60% of the groups all right: no advantage, an EchoClip each
"""

import argparse
import json
import resource
import subprocess
import sys
import time
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

from processes import in_turns, measure, median_of
from rollout import lognormal_lengths

if TYPE_CHECKING:
    from echorl_jax.models import Decoder
    from echorl_jax.training.micro_batches import Bounds
    from echorl_jax.training.setup import Setup

PROMPT, NEW, GROUP, MEAN = 64, 128, 8, 32


def batch_of(data: dict[str, Any], case: str) -> Any:
    """A :class:`TrainBatch` (NumPy) of the synthetic rollouts, final weights and all."""
    import numpy as np

    from echorl_jax.types import TrainBatch

    rows = len(data["adv"])
    lengths = np.full(rows, NEW)
    if case == "long_tail":
        lengths = np.array(lognormal_lengths(rows, NEW, MEAN))
    advantages = np.asarray(data["adv"], np.float32)
    if case == "degenerate":
        advantages = np.where(np.arange(rows) < rows * 6 // 10, np.float32(0), advantages)
    mask = (np.arange(NEW)[None, :] < lengths[:, None]).astype(np.float32)
    old = np.asarray(data["old"], np.float32)
    echo = np.zeros_like(mask)
    if case in ("echo", "degenerate"):
        echo[::GROUP, : NEW // 2] = 1 / (NEW // 2) / (rows // GROUP)
    return TrainBatch(
        tokens=np.concatenate([data["prompt"], data["completion"]], axis=1).astype(np.int32),
        prompt_length=np.full(rows, PROMPT, np.int32),
        length=(PROMPT + lengths).astype(np.int32),
        loss_mask=mask,
        advantages=advantages,
        old_logprobs=old,
        rollout_logprobs=old,
        token_weights=mask / lengths[:, None].astype(np.float32) / rows,
        echo_weights=echo,
        on_policy=np.ones(rows, bool),
    )


def engine(args: argparse.Namespace) -> dict[str, Any]:
    """Steps of the cases in turns, in this process."""
    import jax

    from echorl_jax.models import load_model
    from echorl_jax.parallel import make_mesh
    from echorl_jax.training.micro_batches import micro_batches, trainable_rows
    from echorl_jax.training.optimizer import init_state
    from echorl_jax.training.update import apply_update

    sys.path.insert(0, args.peers)
    import peerlib  # pyright: ignore[reportMissingImports]

    cases = args.worker.split("+")
    mesh = make_mesh(1, 1, 1)
    model, params = load_model(args.models, dtype="float32", mesh=mesh, remat=args.remat)
    setup = setup_of(model)
    state = init_state(params, setup.optimizer, setup.mesh)
    ready = {}
    for case in cases:
        rows = 40 if case in ("groups", "degenerate") else 32
        data = peerlib.train_batch(rows, PROMPT, NEW, GROUP, model.config.vocab_size)
        batch, used = trainable_rows(batch_of(data, case), every_row=False)
        ready[case] = (batch, used)

    def once(case: str) -> tuple[float, list[float]]:
        nonlocal state
        batch, used = ready[case]
        start = time.perf_counter()
        pieces = micro_batches(batch, used, bounds(args))
        coef = 1e-3 if batch.echo_weights.any() else 0.0
        micro = (piece for _, piece in pieces)
        state, stats = apply_update(setup, state, micro, echo_coef=coef)
        loss = [float(stats.loss), float(stats.grad_norm)]
        jax.block_until_ready(state)
        return time.perf_counter() - start, loss

    first = {case: once(case) for case in cases}
    seconds: dict[str, list[float]] = {case: [] for case in cases}
    for _ in range(args.repeats):
        for case in cases:
            seconds[case].append(once(case)[0])
    case = cases[0]
    return {
        "seconds": seconds[case],
        "cases": seconds,
        "loss_gradnorm": [first[case][1]],
        "first_call_seconds": round(first[case][0], 2),
    }


def lora_turns(args: argparse.Namespace) -> dict[str, Any]:
    """Updates of all weights and of adapters; samples of merged weights and with adapters."""
    import jax
    from echo_overhead import ratios

    from echorl_jax.models import Lora, init_adapters, load_model, split_params, with_adapters
    from echorl_jax.parallel import make_mesh
    from echorl_jax.rollout import generate
    from echorl_jax.training.micro_batches import micro_batches, trainable_rows
    from echorl_jax.training.optimizer import init_state
    from echorl_jax.training.update import apply_update

    sys.path.insert(0, args.peers)
    import peerlib  # pyright: ignore[reportMissingImports]

    mesh = make_mesh(1, 1, 1)
    model, params = load_model(args.models, dtype="float32", mesh=mesh, remat=args.remat)
    names = ("q", "k", "v", "o", "gate", "up", "down")
    lora = Lora.uniform(model.config, names, rank=args.lora, alpha=16.0, rslora=False)
    adapters = init_adapters(model, lora, jax.random.key(0), init="kaiming", mesh=mesh)
    policies = {
        "full": (model, params),
        "lora": with_adapters(model, params, lora, adapters, mesh),
    }
    data = peerlib.train_batch(32, PROMPT, NEW, GROUP, model.config.vocab_size)
    batch, used = trainable_rows(batch_of(data, "full"), every_row=False)
    prompts = data["prompt"][::GROUP].tolist()
    states = {}
    for name, (policy, weights) in policies.items():
        setup, (frozen, trainable) = setup_of(policy), split_params(policy, weights)
        # An update gives its buffers away, and the sampler reads these arrays too.
        trainable = jax.tree.map(lambda leaf: leaf.copy(), trainable)
        states[name] = setup, frozen, init_state(trainable, setup.optimizer, mesh)

    def update(name: str) -> None:
        setup, frozen, state = states[name]
        pieces = (piece for _, piece in micro_batches(batch, used, bounds(args)))
        state, _ = apply_update(setup, state, pieces, echo_coef=0.0, frozen=frozen)
        states[name] = setup, frozen, jax.block_until_ready(state)

    def sample(name: str) -> None:
        policy, weights = policies[name]
        jax.block_until_ready(
            generate(
                policy,
                weights,
                prompts,
                jax.random.key(0),
                group_size=GROUP,
                max_new_tokens=NEW,
                eos_ids=(),
            )
        )

    found: dict[str, Any] = {"rank": args.lora, "rows": len(data["adv"])}
    for work in (update, sample):
        clocks = {"clock": time.perf_counter, "processor": time.process_time}
        turns: dict[str, list[tuple[float, float]]] = {clock: [] for clock in clocks}
        for _ in range(args.repeats + 1):
            ticks = [{clock: read() for clock, read in clocks.items()}]
            for name in policies:
                work(name)
                ticks.append({clock: read() for clock, read in clocks.items()})
            for clock in clocks:
                start, middle, end = (tick[clock] for tick in ticks)
                turns[clock].append((middle - start, end - middle))
        found[work.__name__] = {
            clock: {
                **{f"{n}_s": round(median(t[i] for t in taken), 3) for i, n in enumerate(policies)},
                "lora/full": ratios(taken),
            }
            for clock, (_, *taken) in turns.items()  # the first turn compiles
        }
    return found


def setup_of(model: "Decoder") -> "Setup":
    """One device, a constant learning rate; the gradient is not clipped, as peers do not."""
    from echorl_jax.config import Config, OptimConfig
    from echorl_jax.core import load_objective
    from echorl_jax.parallel import make_mesh, platform_of
    from echorl_jax.training.setup import static_setup

    mesh = make_mesh(1, 1, 1)
    objective = load_objective("grpo", aggregation="seq-mean-token-mean", kl_coef=0.0)
    optim = OptimConfig(
        learning_rate=1e-6,
        schedule="constant",
        warmup_steps=0,
        beta2=0.99,
        weight_decay=0.1,
        max_grad_norm=1e9,
    )
    return static_setup(Config(optim=optim), mesh, model, objective, platform=platform_of(mesh))


def bounds(args: argparse.Namespace) -> "Bounds":
    """Micro-batches of ``args.rows`` of the longest rows."""
    from echorl_jax.training.micro_batches import Bounds

    longest = PROMPT + NEW
    return Bounds(longest=longest, token_budget=args.rows * longest, row_multiple=1)


def temporary_bytes(args: argparse.Namespace) -> int:
    """What the compiler sets aside for the gradient of a micro-batch of the case ``full``."""
    from echorl_jax.models import load_decoder
    from echorl_jax.training.micro_batches import micro_batches, trainable_rows
    from echorl_jax.training.update import lower_accumulate

    sys.path.insert(0, args.peers)
    import peerlib  # pyright: ignore[reportMissingImports]

    model = load_decoder(args.models, dtype="float32", remat=args.remat)
    data = peerlib.train_batch(32, PROMPT, NEW, GROUP, model.config.vocab_size)
    batch, used = trainable_rows(batch_of(data, "full"), every_row=False)
    _, piece = next(micro_batches(batch, used, bounds(args)))
    lowered = lower_accumulate(setup_of(model), model.param_shapes(), piece)
    compiled = lowered.compile()
    return compiled.memory_analysis().temp_size_in_bytes


def work(args: argparse.Namespace) -> None:
    """One measurement as a line of JSON."""
    from echorl_jax import xla

    xla.set_flags()
    if args.worker == "temporary":
        print(json.dumps({"bytes": temporary_bytes(args)}))
        return
    if args.worker == "lora":
        print(json.dumps(lora_turns(args)))
        return
    result = engine(args)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(json.dumps({**result, "peak_rss_mb": round(peak, 1)}))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--peers", required=True)
    parser.add_argument("--models", required=True, help="directory with tiny/ and small/")
    parser.add_argument("--size", default="small", choices=("tiny", "small"))
    parser.add_argument("--tunix-python", default="")
    parser.add_argument("--torch-python", default="")
    parser.add_argument("--rows", type=int, default=8, help="rows of our micro-batches")
    parser.add_argument("--remat", default="dots", choices=("layer", "dots", "none"))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--repeats", type=int, default=2, help="timed steps in a process")
    parser.add_argument("--lora", type=int, default=0, help="rank; only adapters against all")
    parser.add_argument("--worker", default="", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        return work(args)
    directory = Path(args.models) / args.size
    if not (directory / "model.safetensors").exists():
        make = [args.torch_python, str(Path(args.peers) / "make_model.py"), args.size]
        subprocess.run([*make, str(directory)], check=True)
    ours = [sys.executable, __file__, f"--peers={args.peers}", f"--models={directory}"]
    ours += [f"--repeats={args.repeats}", f"--rows={args.rows}", f"--remat={args.remat}"]
    if args.lora:
        print(json.dumps(measure([*ours, f"--lora={args.lora}", "--worker=lora"]), indent=1))
        return
    programs = {"engine": [*ours, "--worker=full"]}
    for name, python, script in (
        ("tunix", args.tunix_python, "train_tunix.py"),
        ("torch", args.torch_python, "train_trl_like_torch.py"),
    ):
        if python:
            program = str(Path(args.peers) / script)
            programs[name] = [python, program, str(directory), f"--reps={args.repeats}"]
    programs["pair"] = [*ours, "--worker=full+echo+long_tail"]
    programs["groups"] = [*ours, "--worker=groups+degenerate"]
    found = in_turns(programs, args.rounds)
    print(json.dumps(summary(found, in_turns({"t": [*ours, "--worker=temporary"]}, 1)), indent=1))


def summary(found: dict[str, list[dict[str, Any]]], temporary: dict[str, Any]) -> dict[str, Any]:
    """Medians and ratios."""
    table: dict[str, Any] = {}
    for name in ("engine", "tunix", "torch"):
        if runs := found.get(name):
            table[name] = {
                "seconds": round(median_of(runs, "seconds"), 3),
                "peak_rss_mb": max(run["peak_rss_mb"] for run in runs),
                "first_loss_and_gradient_norm": runs[0]["loss_gradnorm"][0],
            }
    if temporary["t"]:
        table["engine"]["temporary_mb"] = round(temporary["t"][0]["bytes"] / 2**20)
    ratio = {}
    for name in ("tunix", "torch"):
        if name in table:
            ratio[f"engine/{name}"] = table["engine"]["seconds"] / table[name]["seconds"]

    def paired(runs: list[dict[str, Any]], case: str, base: str) -> float:
        """Steps that ran one after the other are compared."""
        return median(
            one / other
            for run in runs
            for one, other in zip(run["cases"][case], run["cases"][base], strict=True)
        )

    ratio["echo/full"] = paired(found["pair"], "echo", "full")
    ratio["long_tail/full"] = paired(found["pair"], "long_tail", "full")
    ratio["degenerate/groups"] = paired(found["groups"], "degenerate", "groups")
    table["ratio"] = {name: round(value, 3) for name, value in ratio.items()}
    return table


if __name__ == "__main__":
    main()
