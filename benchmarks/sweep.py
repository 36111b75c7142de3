"""The study: many short runs on Countdown, with and without echo, as one table with intervals.

A run is a setting (objective, echo, coef, select, when, window) and a seed. Each is one process of
`echorl train` in a directory of its own under --out; as many at a time as --processes, each on
its share of the cores. A run that is finished is kept, one that was killed goes on from its
checkpoint: the same command picks up where it stopped. Runs that several grids share are done once.

    python benchmarks/sweep.py --grid=main --seeds=5 --out=runs/sweep
    python benchmarks/sweep.py --grid=coef,select,window,when,objectives --seeds=3 --out=runs/sweep
    python benchmarks/sweep.py --objective=grpo,dapo --echo=on,off --coef=1e-3,1e-2 --seeds=2 \\
        --steps=100 --out=runs/own

Writes to --out: sweep.jsonl (a line per run), table.md, report.html. Prints the table. Success is
pass@1 at temperature 1 on held-out problems, with pass@k from the same attempts.
"""

import argparse
import dataclasses
import itertools
import json
import os
import queue
import re
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path

from echorl_jax.config_file import load_config, to_dict
from echorl_jax.files import write_jsonl
from echorl_jax.tools.report.page import write_page
from echorl_jax.tools.report.runs import read_run
from echorl_jax.tools.report.sweep import Outcome, read_outcome, sweep_section, sweep_table

WINDOWS = ("always", "early", "late")
COEFS = ("0", "1e-4", "1e-3", "1e-2", "1e-1")
SELECTS = ("max", "min", "full", "random", "first", "last")
OBJECTIVES = ("grpo", "dapo", "luffy", "uft")


@dataclasses.dataclass(frozen=True)
class Setting:
    """What is varied; the defaults are the paper's."""

    objective: str = "grpo"
    echo: bool = True
    coef: str = "1e-3"
    select: str = "max"
    when: str = "any_success"
    window: str = "always"  # early: the first half of the steps; late: the second

    @property
    def name(self) -> str:
        """Such as ``grpo``, ``grpo + echo`` or ``grpo + echo, select=min``."""
        if not self.echo:
            return self.objective
        usual = Setting()
        changed = [
            f"{key}={value}"
            for key, value in vars(self).items()
            if key not in ("objective", "echo") and value != vars(usual)[key]
        ]
        return ", ".join([f"{self.objective} + echo", *changed])

    @property
    def plain(self) -> "Setting":
        """The same without echo."""
        return Setting(self.objective, echo=False)

    def options(self, steps: int) -> dict[str, str]:
        """The config keys that it sets."""
        options = {"objective.name": self.objective, "echo.enabled": str(self.echo).lower()}
        if self.echo:
            options |= {"echo.coef": self.coef, "echo.select": self.select, "echo.when": self.when}
            if self.window == "early":
                options["echo.end_step"] = str(steps // 2)
            if self.window == "late":
                options["echo.start_step"] = str(steps // 2)
        return options


@dataclasses.dataclass(frozen=True)
class Job:
    """One run."""

    setting: Setting
    seed: int
    directory: Path
    steps: int


PLAIN, ECHO = Setting(echo=False), Setting()
GRIDS: dict[str, list[Setting]] = {
    "main": [PLAIN, ECHO],
    "coef": [PLAIN, *(Setting(coef=coef) for coef in COEFS if float(coef))],
    "select": [PLAIN, *(Setting(select=select) for select in SELECTS)],
    "window": [PLAIN, *(Setting(window=window) for window in WINDOWS)],
    "when": [PLAIN, ECHO, Setting(when="degenerate_only")],
    "objectives": [Setting(name, echo) for name in OBJECTIVES for echo in (False, True)],
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
    return list(dict.fromkeys(s if s.echo and float(s.coef) else s.plain for s in made))


def options_of(job: Job, arguments: argparse.Namespace) -> dict[str, str]:
    """A cheap run: no report, no export, few checkpoints and samples, evaluation at both ends."""
    return {
        "steps": str(job.steps),
        "seed": str(job.seed),
        "data.eval": f"countdown:split=eval&count={arguments.problems}",
        "eval.every": str(job.steps),
        "eval.samples": str(arguments.samples),
        "eval.temperature": "1.0",
        "checkpoint.every": "50",
        "checkpoint.keep": "1",
        "checkpoint.export": "false",
        "log.report": "false",
        "log.tensorboard": "false",
        "log.samples_every": "50",
        **job.setting.options(job.steps),
        **dict(word.removeprefix("--config.").split("=", 1) for word in arguments.rest),
    }


def require_same(job: Job, arguments: argparse.Namespace) -> None:
    """Stops where a directory holds a run with other options; more steps may follow fewer."""
    file = job.directory / "config.json"
    if not file.is_file():
        return
    before = json.loads(file.read_text())
    now = to_dict(load_config(arguments.config, options_of(job, arguments)))
    longer = before["steps"] < now["steps"]
    for section, values in now.items():
        same = values == before.get(section)
        free = section in ("log", "checkpoint") or (longer and section in ("steps", "eval"))
        if not same and not free:
            raise SystemExit(
                f"sweep: {job.directory} holds a run with other options ({section}): "
                "take another --out, or the options it was made with"
            )


def command(job: Job, arguments: argparse.Namespace) -> list[str]:
    """What starts a run, or goes on with it."""
    flags = [f"--config.{key}={value}" for key, value in options_of(job, arguments).items()]
    train = [sys.executable, "-m", "echorl_jax", "train", f"--config={arguments.config}"]
    return [*train, f"--workdir={job.directory}", *flags]


def do(job: Job, arguments: argparse.Namespace) -> tuple[Job, int, float]:
    """Runs one job on the cores of the calling thread; returns its exit code and seconds."""
    job.directory.parent.mkdir(parents=True, exist_ok=True)
    environment = os.environ | {
        "JAX_COMPILATION_CACHE_DIR": str(arguments.out / "compiled"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.5",
    }
    start = time.monotonic()
    with Path(f"{job.directory}.log").open("a") as log:
        done = subprocess.run(
            command(job, arguments), stdout=log, stderr=subprocess.STDOUT, env=environment
        )
    return job, done.returncode, time.monotonic() - start


def run_all(jobs: Sequence[Job], arguments: argparse.Namespace) -> int:
    """Runs what is not finished, several at a time; returns how many failed."""
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
            outcome = outcome_of(job)
            failed += outcome is None
            result = (
                f"success {outcome.before:.1%} -> {outcome.pass_1:.1%}"
                if outcome
                else f"exit code {code}, see {job.directory}.log"
            )
            print(
                f"[{finished}/{len(jobs)}] {job.setting.name}, seed {job.seed}: {result} "
                f"({seconds:.0f} s)",
                flush=True,
            )
    return failed


def folder_of(setting: Setting) -> str:
    """Such as ``grpo-echo-select=min``."""
    return re.sub(r"[^\w.=-]+", "-", setting.name)


def outcome_of(job: Job) -> Outcome | None:
    """How a run ended; None while it has not."""
    return read_outcome(job.directory, setting=job.setting.name, seed=job.seed, steps=job.steps)


def summarise(jobs: Sequence[Job], out: Path) -> None:
    """Writes what the finished runs say, and prints the table."""
    found = [(job, outcome) for job in jobs if (outcome := outcome_of(job)) is not None]
    if not found:
        print("no run has finished yet")
        return
    outcomes = [outcome for _, outcome in found]
    against = {job.setting.name: job.setting.plain.name for job in jobs if job.setting.echo}
    write_jsonl(out / "sweep.jsonl", [dataclasses.asdict(outcome) for outcome in outcomes])
    columns, rows = sweep_table(outcomes, against)
    lines = [columns, ["---"] * len(columns), *rows]
    table = "".join(f"| {' | '.join(line)} |\n" for line in lines)
    (out / "table.md").write_text(table)
    runs = {job.setting.name: [] for job, _ in found}
    for job, _ in found:
        runs[job.setting.name].append(read_run(job.directory))
    section = sweep_section(outcomes, against, runs)
    title = f"{len(runs)} settings, {len(found)} runs on Countdown"
    write_page(out / "report.html", "Sweep", [section], headline=title)
    print(table, end="")
    print(f"report: {out / 'report.html'}")


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
    add("--coef", type=words, default=[ECHO.coef], help="default 1e-3")
    add("--select", type=words, default=[ECHO.select], help="default max")
    add("--when", type=words, default=[ECHO.when], help="default any_success")
    add("--window", type=words, default=["always"], help=f"of {', '.join(WINDOWS)}")
    add("--seeds", default="3", help="how many, from 0 on, or a list: 0,4,7 (default 3)")
    add("--steps", type=int, default=250, help="of each run (default 250)")
    add("--problems", type=int, default=1024, help="held-out problems (default 1,024)")
    add("--samples", type=int, default=8, help="attempts at each, k of pass@k (default 8)")
    add(
        "--processes", type=int, default=os.cpu_count() or 1, help="runs at a time (default: cores)"
    )
    add("--config", default="configs/countdown.py", help="what the runs have in common")
    add("--out", type=Path, required=True, help="where runs and results are kept")
    add("--table", action="store_true", help="only tabulate what is finished")
    arguments, arguments.rest = parser.parse_known_args(argv)
    wrong = [word for word in arguments.rest if not re.fullmatch(r"--config\.[\w.]+=.*", word)]
    wrong += [name for name in arguments.grid if name not in GRIDS]
    wrong += [word for word in arguments.echo if word not in ("on", "off")]
    wrong += [word for word in arguments.window if word not in WINDOWS]
    if wrong:
        parser.error(f"not understood: {' '.join(wrong)}")
    if min(arguments.steps, arguments.problems, arguments.samples, arguments.processes) < 1:
        parser.error("--steps, --problems, --samples and --processes must be at least 1")
    return arguments


def main() -> int:
    """Runs the grid and tabulates it; exit code 1 if a run failed."""
    arguments = parse()
    out, text = arguments.out, arguments.seeds
    seeds = [int(seed) for seed in text.split(",")] if "," in text else list(range(int(text)))
    jobs = [
        Job(setting, seed, out / folder_of(setting) / f"seed-{seed}", arguments.steps)
        for seed in seeds
        for setting in settings_of(arguments)
    ]
    for job in jobs:
        require_same(job, arguments)
    todo = [job for job in jobs if outcome_of(job) is None]
    failed = 0
    if not arguments.table:
        print(f"{len(jobs)} runs, {len(jobs) - len(todo)} of them finished before", flush=True)
        failed = run_all(todo, arguments)
    summarise(jobs, out)
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
