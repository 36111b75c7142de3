"""The study: many short runs, with and without echo and of rival methods, with intervals.

A run is a setting (objective, echo, coef, select, when, window, further options) and a seed. Each
is one process of `echorl train` in a directory of its own under --out; as many at a time as
--processes, each on its share of the cores. A run that was killed goes on from its checkpoint, and
one that is in the file of results is not done again, with or without its directory: the same
command picks up where it stopped. Runs that several grids share are done once.

    python benchmarks/sweep.py --grid=main --seeds=5 --out=runs/sweep
    python benchmarks/sweep.py --grid=coef,select,window,when,objectives --seeds=3 --out=runs/sweep
    python benchmarks/sweep.py --objective=grpo,dapo --echo=on,off --coef=1e-3,1e-2 --seeds=2 \\
        --steps=100 --out=runs/own
    python benchmarks/sweep.py --grid=lora --seeds=5 --steps=80 --problems=512 --out=runs/lora
    python benchmarks/sweep.py --config=configs/reduce.py --grid=study --seeds=8 --out=runs/reduce
    python benchmarks/sweep.py ... --match      the matched coefficients alone, without the runs
    python benchmarks/sweep.py ... --power      the differences that so many seeds can show
    python benchmarks/sweep.py ... --again=1    a finished run, picked by --again, once more

A coefficient may be "matched" or "matched*0.3": then a solved prompt's tokens get as much summed
weight from the echo loss (or 0.3 of that) as from --rival, both measured on the first weights, in
--out/matched.

Writes to --out: results.jsonl (a line per run, with its options, a hash of its whole config, and
versions), table.md, report.html. Prints the tables. Evaluations are at temperature 1 on held-out
problems, with pass@k from the same attempts.
"""

import argparse
import dataclasses
import hashlib
import itertools
import json
import os
import queue
import random
import re
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any

import numpy as np

from echorl_jax.config_file import load_config, to_dict
from echorl_jax.files import read_jsonl, write_jsonl
from echorl_jax.tools.report.page import write_page
from echorl_jax.tools.report.runs import Run, read_run
from echorl_jax.tools.report.sweep import (
    Outcome,
    detectable,
    points,
    read_outcome,
    sweep_section,
    sweep_tables,
)

WINDOWS = ("always", "early", "late")
COEFS = ("0", "1e-4", "1e-3", "1e-2", "1e-1")
SELECTS = ("max", "min", "full", "random", "first", "last")
OBJECTIVES = ("grpo", "dapo", "luffy", "uft")
MATCHED = re.compile(r"matched(?:\*([0-9.e-]+))?")
# Steps with frozen weights over which the weight on solved prompts is averaged.
PROBE_STEPS = 8
# Parts of the config that change no result.
FREE = ("log", "checkpoint", "debug")


@dataclasses.dataclass(frozen=True)
class Setting:
    """What is varied; the defaults are the paper's."""

    objective: str = "grpo"
    echo: bool = True
    coef: str = "1e-3"  # a number, matched, or matched*NUMBER
    select: str = "max"
    when: str = "any_success"
    window: str = "always"  # early: the first half of the steps; late: the second
    more: tuple[str, ...] = ()  # further options, KEY=VALUE

    @property
    def name(self) -> str:
        """Such as ``grpo``, ``grpo + echo`` or ``grpo + echo, select=min``."""
        usual = Setting()
        changed = [
            f"{key}={value}"
            for key, value in vars(self).items()
            if self.echo and key not in ("objective", "echo", "more") and value != vars(usual)[key]
        ]
        changed += [word.rpartition(".")[2] for word in self.more]
        return ", ".join([f"{self.objective} + echo" if self.echo else self.objective, *changed])

    @property
    def plain(self) -> "Setting":
        """The same without echo."""
        more = tuple(word for word in self.more if not word.startswith("echo."))
        return Setting(self.objective, echo=False, more=more)

    @property
    def reference(self) -> "Setting":
        """The setting to compare with: the same without echo; GRPO for a rival."""
        return self.plain if self.echo else PLAIN

    def options(self, steps: int, coef: str | None = None) -> dict[str, str]:
        """The config keys that it sets; ``coef`` replaces its own."""
        options = {"objective.name": self.objective, "echo.enabled": str(self.echo).lower()}
        if self.echo:
            chosen = self.coef if coef is None else coef
            options |= {"echo.coef": chosen, "echo.select": self.select, "echo.when": self.when}
            if self.window == "early":
                options["echo.end_step"] = str(steps // 2)
            if self.window == "late":
                options["echo.start_step"] = str(steps // 2)
        return options | dict(word.split("=", 1) for word in self.more)


@dataclasses.dataclass(frozen=True)
class Job:
    """One run."""

    setting: Setting
    seed: int
    directory: Path
    steps: int
    coef: str | None = None  # the number in place of "matched"


PLAIN, ECHO = Setting(echo=False), Setting()
MATCH = Setting(coef="matched")
GRIDS: dict[str, list[Setting]] = {
    "main": [PLAIN, ECHO],
    "coef": [PLAIN, *(Setting(coef=coef) for coef in COEFS if float(coef))],
    "select": [PLAIN, *(Setting(select=select) for select in SELECTS)],
    "window": [PLAIN, *(Setting(window=window) for window in WINDOWS)],
    "when": [PLAIN, ECHO, Setting(when="degenerate_only")],
    # Rank 8 at ten times the learning rate of configs/countdown.py.
    "lora": [PLAIN, Setting(echo=False, more=("lora.rank=8", "optim.learning_rate=4e-4"))],
    "objectives": [Setting(name, echo) for name in OBJECTIVES for echo in (False, True)],
    # The comparison with rivals, in order of importance.
    "study": [PLAIN, ECHO, MATCH, Setting("rl_zvp", echo=False)],
    "study-coef": [PLAIN, Setting(coef="matched*0.3"), Setting(coef="matched*0.03")],
    "study-select": [
        PLAIN,
        *(Setting(coef="matched", select=name) for name in ("random", "min", "first", "full")),
        Setting(coef="matched", when="degenerate_only"),
    ],
    "study-rivals": [
        PLAIN,
        Setting("rl_zvp", echo=False, more=("objective.zero_variance_failures=false",)),
        *(Setting(name, echo=False) for name in ("avspo", "psr", "w_reinforce")),
        # VAPO's loss on correct answers: the echo of every whole success, a mean over tokens.
        Setting(coef="0.1", select="full", more=("echo.top_k=8", "echo.normalise=tokens")),
        # MCPO's hinge is zero at the first of several updates.
        *(Setting(n, echo=False, more=("objective.mini_batches=2",)) for n in ("grpo", "mcpo")),
        Setting(echo=False, more=("objective.dynamic_sampling=true",)),
    ],
    "study-objectives": [
        Setting(name, echo, coef="matched" if echo else "1e-3")
        for name in ("dapo", "luffy", "uft")
        for echo in (False, True)
    ],
}


def settings_of(arguments: argparse.Namespace) -> list[Setting]:
    """The named grids, or the product of the lists that are given; nothing twice."""
    if arguments.grid:
        return list(dict.fromkeys(s for name in arguments.grid for s in GRIDS[name]))
    product = itertools.product(
        arguments.objective,
        [word == "on" for word in arguments.echo],
        arguments.coef,
        arguments.select,
        arguments.when,
        arguments.window,
    )
    # Without echo, or with a coefficient of 0, the other choices change nothing.
    made = (Setting(*values) for values in product)
    kept = (s if s.echo and (MATCHED.fullmatch(s.coef) or float(s.coef)) else s.plain for s in made)
    return list(dict.fromkeys(kept))


def options_of(job: Job, arguments: argparse.Namespace) -> dict[str, str]:
    """A cheap run: no report, no export, few checkpoints and samples, evaluation at both ends."""
    return {
        "steps": str(job.steps),
        "seed": str(job.seed),
        "eval.every": str(job.steps),
        "eval.samples": str(arguments.samples),
        "eval.temperature": "1.0",
        "eval.rows": str(arguments.problems),
        "checkpoint.every": "50",
        "checkpoint.keep": "1",
        "checkpoint.keep_best": "0",
        "checkpoint.export": "false",
        "log.report": "false",
        "log.tensorboard": "false",
        "log.samples_every": "50",
        **job.setting.options(job.steps, job.coef),
        **dict(word.removeprefix("--config.").split("=", 1) for word in arguments.rest),
    }


def config_of(job: Job, arguments: argparse.Namespace) -> dict[str, Any]:
    """The whole config of a run."""
    return to_dict(load_config(arguments.config, options_of(job, arguments)))


def digest(config: dict[str, Any]) -> str:
    """A hash of all parts of a config that change results."""
    kept = {section: values for section, values in config.items() if section not in FREE}
    text = json.dumps(kept, sort_keys=True).encode()
    return hashlib.blake2b(text, digest_size=8).hexdigest()


def require_same(job: Job, arguments: argparse.Namespace) -> None:
    """Stops where a directory holds a run with other options; more steps may follow fewer."""
    file = job.directory / "config.json"
    if not file.is_file():
        return
    before, now = json.loads(file.read_text()), config_of(job, arguments)
    longer = before["steps"] < now["steps"]
    for section, values in now.items():
        same = values == before.get(section)
        free = section in FREE or (longer and section in ("steps", "eval"))
        if not same and not free:
            raise SystemExit(
                f"sweep: {job.directory} holds a run with other options ({section}): "
                "take another --out, or the options it was made with"
            )


def train(directory: Path, options: dict[str, str], arguments: argparse.Namespace) -> int:
    """Starts a run, or goes on with it, on the cores of the calling thread; its exit code."""
    directory.parent.mkdir(parents=True, exist_ok=True)
    flags = [f"--config.{key}={value}" for key, value in options.items()]
    program = [sys.executable, "-m", "echorl_jax", "train", f"--config={arguments.config}"]
    environment = os.environ | {
        "JAX_COMPILATION_CACHE_DIR": str(arguments.out / "compiled"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.5",
    }
    with Path(f"{directory}.log").open("a") as log:
        return subprocess.run(
            [*program, f"--workdir={directory}", *flags],
            stdout=log,
            stderr=subprocess.STDOUT,
            env=environment,
        ).returncode


def solved_weight(setting: Setting, arguments: argparse.Namespace) -> float:
    """``echo/solved_weight`` on the first weights, mean over steps with a solved prompt.

    The echo counts with a coefficient of 1; the weight is linear in it.
    """
    directory = arguments.out / "matched" / folder_of(dataclasses.replace(setting, coef="1e-3"))
    job = Job(setting, 0, directory, PROBE_STEPS, coef="1")
    # Adam moves a weight by at most the learning rate: float32 keeps it as it is.
    frozen = {"optim.learning_rate": "1e-20", "optim.warmup_steps": "0", "eval.every": "0"}
    frozen |= {"checkpoint.every": "0", "rollout.check_every": "0"}
    done = directory.is_dir() and read_run(directory).steps_done == PROBE_STEPS
    if not done and train(directory, options_of(job, arguments) | frozen, arguments):
        raise SystemExit(f"sweep: a probe failed, see {directory}.log")
    weights = [value for value in read_run(directory).series("echo/solved_weight")[1] if value]
    return sum(weights) / len(weights) if weights else 0.0


def matched_coef(setting: Setting, arguments: argparse.Namespace) -> str:
    """The coefficient with which an echo adds as much weight to solved prompts as the rival has.

    Raises:
      SystemExit: no prompt is solved on the first weights, or the rival gives them no weight.
    """
    rival = solved_weight(Setting(arguments.rival, echo=False), arguments)
    own = solved_weight(setting, arguments) - solved_weight(setting.plain, arguments)
    if rival <= 0 or own <= 0:
        raise SystemExit(
            f"sweep: no weight to match: {arguments.rival} {rival:.3g}, {setting.name} {own:.3g}"
        )
    found = MATCHED.fullmatch(setting.coef)
    assert found is not None
    return f"{float(found[1] or 1) * rival / own:.3g}"


def jobs_of(arguments: argparse.Namespace, seeds: Sequence[int]) -> list[Job]:
    """Every run, seed by seed; measures what is to be matched."""
    settings = settings_of(arguments)
    coefs = {s: matched_coef(s, arguments) for s in settings if s.echo and "matched" in s.coef}
    for setting, coef in coefs.items():
        print(f"{setting.name}: echo.coef {coef}, matched to {arguments.rival}", flush=True)
    return [
        Job(s, seed, arguments.out / folder_of(s) / f"seed-{seed}", arguments.steps, coefs.get(s))
        for seed in seeds
        for s in settings
    ]


def do(job: Job, arguments: argparse.Namespace) -> tuple[Job, int, float]:
    """Runs one job; returns its exit code and seconds."""
    start = time.monotonic()
    code = train(job.directory, options_of(job, arguments), arguments)
    return job, code, time.monotonic() - start


def run_all(jobs: Sequence[Job], arguments: argparse.Namespace) -> int:
    """Runs several at a time, and notes each in the file of results; returns how many failed."""
    failed = finished = 0
    cores: queue.Queue[set[int]] = queue.Queue()
    every = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
    for slot in range(arguments.processes):
        cores.put(set(every[slot :: arguments.processes]) or set(every))

    def settle() -> None:
        # A thread's children inherit its cores, and XLA makes as many threads as it has cores.
        if every:
            os.sched_setaffinity(0, cores.get())

    with ThreadPoolExecutor(arguments.processes, initializer=settle) as pool:
        waiting = [pool.submit(do, job, arguments) for job in jobs]
        for done in as_completed(waiting):
            job, code, seconds = done.result()
            finished += 1
            line = line_of(job, arguments)
            failed += line is None
            if line is None:
                result = f"exit code {code}, see {job.directory}.log"
            else:
                with results_file(arguments).open("a") as file:
                    file.write(json.dumps(line) + "\n")
                main = outcome_from(line).main
                result = f"{main} {line['before'].get(main, 0):.1%} -> {line['after'][main]:.1%}"
            print(
                f"[{finished}/{len(jobs)}] {job.setting.name}, seed {job.seed}: {result} "
                f"({seconds:.0f} s)",
                flush=True,
            )
    return failed


def folder_of(setting: Setting) -> str:
    """Such as ``grpo-echo-select=min``."""
    return re.sub(r"[^\w.=-]+", "-", setting.name)


def results_file(arguments: argparse.Namespace) -> Path:
    """A line per finished run."""
    return arguments.results or arguments.out / "results.jsonl"


def line_of(job: Job, arguments: argparse.Namespace) -> dict[str, Any] | None:
    """A finished run's line of results; None while it has not finished."""
    directory = job.directory
    outcome = read_outcome(directory, setting=job.setting.name, seed=job.seed, steps=job.steps)
    if outcome is None:
        return None
    environment = read_run(directory).environment
    return {
        **dataclasses.asdict(outcome),
        "options": job.setting.options(job.steps, job.coef),
        "config": digest(config_of(job, arguments)),
        "python": environment.get("python"),
        "versions": environment.get("packages"),
    }


def outcome_from(line: dict[str, Any]) -> Outcome:
    """The outcome in a line of results."""
    return Outcome(**{field.name: line[field.name] for field in dataclasses.fields(Outcome)})


def known_lines(jobs: Sequence[Job], arguments: argparse.Namespace) -> list[dict[str, Any] | None]:
    """Each job's line: from the file of results, or else from its directory."""
    lines = {
        (line["config"], line["setting"]): line for line in read_jsonl(results_file(arguments))
    }
    found = []
    for job in jobs:
        key = (digest(config_of(job, arguments)), job.setting.name)
        found.append(lines.get(key) or line_of(job, arguments))
    return found


def summarise(jobs: Sequence[Job], arguments: argparse.Namespace) -> list[Outcome]:
    """Writes what the finished runs say, prints the tables, and returns the outcomes."""
    found = [
        (job, line)
        for job, line in zip(jobs, known_lines(jobs, arguments), strict=True)
        if line is not None
    ]
    if not found:
        print("no run has finished yet")
        return []
    write_jsonl(results_file(arguments), other_lines(found, arguments))
    outcomes = [outcome_from(line) for _, line in found]
    against = {job.setting.name: job.setting.reference.name for job in jobs if job.setting != PLAIN}
    text = "\n".join(
        "".join(f"| {' | '.join(line)} |\n" for line in [columns, ["---"] * len(columns), *rows])
        for columns, rows in sweep_tables(outcomes, against)
    )
    (arguments.out / "table.md").write_text(text)
    runs: dict[str, list[Run]] = {}
    for job, _ in found:
        if job.directory.is_dir():
            runs.setdefault(job.setting.name, []).append(read_run(job.directory))
    section = sweep_section(outcomes, against, runs)
    title = f"{len({o.setting for o in outcomes})} settings, {len(found)} runs"
    write_page(arguments.out / "report.html", "Sweep", [section], headline=title)
    print(text, end="")
    print(f"report: {arguments.out / 'report.html'}")
    return outcomes


def other_lines(
    found: Sequence[tuple[Job, dict[str, Any]]], arguments: argparse.Namespace
) -> list[dict[str, Any]]:
    """All lines for the file of results: those of other grids stay."""
    lines = [*read_jsonl(results_file(arguments)), *(line for _, line in found)]
    return list({(line["config"], line["setting"]): line for line in lines}.values())


def print_power(outcomes: Sequence[Outcome], jobs: Sequence[Job]) -> None:
    """The smallest differences that seeds can show, from the spread of the finished runs.

    Two settings with a pair of seeds give the deviation of paired differences (their median over
    settings, if there are more); the plain setting alone gives sqrt(2) times its deviation, which
    is that of differences between runs that have nothing in common.
    """
    if not outcomes:
        return
    comparisons = len({job.setting for job in jobs}) - 1
    reference = {job.setting.name: job.setting.reference.name for job in jobs}
    for key in outcomes[0].after:
        value = {(o.setting, o.seed): o.after[key] for o in outcomes if key in o.after}
        spreads = []
        for name, other in reference.items():
            seeds = [seed for setting, seed in value if setting == name and (other, seed) in value]
            if name != other and len(seeds) > 1:
                gaps = [value[name, seed] - value[other, seed] for seed in seeds]
                spreads.append(float(np.std(gaps, ddof=1)))
        own = [found for (setting, _), found in value.items() if setting == PLAIN.name]
        if spreads:
            deviation, source = float(np.median(spreads)), "of paired differences"
        elif len(own) > 1:
            deviation, source = 2**0.5 * float(np.std(own, ddof=1)), "as if runs were not paired"
        else:
            continue
        shown = ", ".join(
            f"{n} seeds {points(detectable(deviation, seeds=n, comparisons=max(1, comparisons)))}"
            for n in (3, 5, 8, 12, 20)
        )
        print(f"{key}: deviation {100 * deviation:.2f} points ({source}); {shown}")
    print(f"power 80%, two-sided 5% over {max(1, comparisons)} comparisons")


def repeat(jobs: Sequence[Job], arguments: argparse.Namespace) -> int:
    """Runs a finished job once more in another directory; 1 unless all metrics are equal.

    Times and memory are not compared.
    """
    finished = [job for job in jobs if line_of(job, arguments) is not None]
    if not finished:
        raise SystemExit("sweep: --again needs a finished run")
    job = random.Random(arguments.again).choice(finished)
    copy = dataclasses.replace(job, directory=arguments.out / "again" / job.directory.name)
    copy = dataclasses.replace(copy, directory=Path(f"{copy.directory}-{folder_of(job.setting)}"))
    do(copy, arguments)
    unlike = ("time/", "memory/", "rollout/tokens", "train/tokens", "compile/")
    first, second = (read_run(each.directory).metrics for each in (job, copy))
    # A run that was continued with more steps has evaluations that the other has not.
    equal = len(first) == len(second) and all(
        one[key] == other[key]
        for one, other in zip(first, second, strict=True)
        for key in one.keys() & other.keys()
        if not key.startswith(unlike)
    )
    print(f"{job.setting.name}, seed {job.seed}: {'equal' if equal else 'DIFFERENT'}")
    return int(not equal)


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Reads the command line; ``rest`` keeps ``--config.KEY=VALUE``."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    words = lambda text: text.split(",")  # noqa: E731
    add = parser.add_argument
    add("--grid", type=words, default=[], help=f"of {', '.join(GRIDS)}; or the lists below")
    add("--objective", type=words, default=["grpo"], help="default grpo")
    add("--echo", type=words, default=["off", "on"], help="default off,on")
    add("--coef", type=words, default=[ECHO.coef], help="default 1e-3; or matched, matched*0.3")
    add("--select", type=words, default=[ECHO.select], help="default max")
    add("--when", type=words, default=[ECHO.when], help="default any_success")
    add("--window", type=words, default=["always"], help=f"of {', '.join(WINDOWS)}")
    add("--seeds", default="3", help="how many, from 0 on, or a list: 0,4,7 (default 3)")
    add("--steps", type=int, default=250, help="of each run (default 250)")
    add("--problems", type=int, default=0, help="held-out problems; 0 takes all of the config")
    add("--samples", type=int, default=8, help="attempts at each, k of pass@k (default 8)")
    add(
        "--processes", type=int, default=os.cpu_count() or 1, help="runs at a time (default: cores)"
    )
    add("--config", default="configs/countdown.py", help="what the runs have in common")
    add("--rival", default="rl_zvp", help="objective that matched coefficients are for")
    add("--out", type=Path, required=True, help="where runs and results are kept")
    add("--results", type=Path, help="the file of results (default: OUT/results.jsonl)")
    add("--table", action="store_true", help="only tabulate what is finished")
    add("--match", action="store_true", help="only measure the matched coefficients")
    add("--power", action="store_true", help="only tell what differences seeds can show")
    add("--again", type=int, help="only repeat a finished run, picked by this number")
    arguments, arguments.rest = parser.parse_known_args(argv)
    wrong = [word for word in arguments.rest if not re.fullmatch(r"--config\.[\w.]+=.*", word)]
    wrong += [name for name in arguments.grid if name not in GRIDS]
    wrong += [word for word in arguments.echo if word not in ("on", "off")]
    wrong += [word for word in arguments.window if word not in WINDOWS]
    if wrong:
        parser.error(f"not understood: {' '.join(wrong)}")
    if min(arguments.steps, arguments.samples, arguments.processes) < 1 or arguments.problems < 0:
        parser.error("--steps, --samples and --processes must be at least 1, --problems 0")
    return arguments


def main() -> int:
    """Runs the grid and tabulates it; exit code 1 if a run failed."""
    arguments = parse()
    text = arguments.seeds
    seeds = [int(seed) for seed in text.split(",")] if "," in text else list(range(int(text)))
    arguments.out.mkdir(parents=True, exist_ok=True)
    jobs = jobs_of(arguments, seeds)
    if arguments.match:
        return 0
    for job in jobs:
        require_same(job, arguments)
    if arguments.again is not None:
        return repeat(jobs, arguments)
    failed = 0
    if not (arguments.table or arguments.power):
        known = known_lines(jobs, arguments)
        todo = [job for job, line in zip(jobs, known, strict=True) if line is None]
        print(f"{len(jobs)} runs, {len(jobs) - len(todo)} of them finished before", flush=True)
        failed = run_all(todo, arguments)
    outcomes = summarise(jobs, arguments)
    if arguments.power:
        print_power(outcomes, jobs)
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
