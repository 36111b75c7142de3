"""Writes the files of a run, filled with random numbers, in the layout of training."""

import json
import math
import random
from pathlib import Path

GROUP_SIZE = 4


def write_run(
    workdir: Path,
    *,
    steps: int = 30,
    seed: int = 0,
    prompts: int = 20,
    prompts_per_step: int = 8,
    samples_every: int = 5,
    samples_groups: int = 3,
    eval_every: int = 10,
    echo: bool = True,
) -> Path:
    """Writes metrics, samples, ledger, config and environment under ``workdir`` and returns it."""
    rng = random.Random(seed)
    (workdir / "samples").mkdir(parents=True, exist_ok=True)
    metrics, ledger = [], []
    for step in range(steps):
        progress = (step + 1) / max(steps, 1)
        skill = 0.35 + 0.25 * progress + 0.02 * seed
        groups = [_group(rng, skill, rng.randrange(prompts), echo) for _ in range(prompts_per_step)]
        ledger.append({"step": step, "groups": groups})
        last = step == steps - 1
        evaluated = eval_every and (step % eval_every == 0 or last)
        metrics.append(_metrics(rng, step, progress, skill, groups, evaluated, echo))
        if samples_every and (step % samples_every == 0 or last):
            rows = [
                row
                for g in range(samples_groups)
                for row in sample_group(rng, step, g, groups[g]["index"], skill, echo)
            ]
            dump_lines(workdir / "samples" / f"step_{step:06d}.jsonl", rows)
    dump_lines(workdir / "metrics.jsonl", metrics)
    dump_lines(workdir / "samples" / "ledger.jsonl", ledger)
    config = {"steps": steps, "seed": seed, "echo": {"enabled": echo, "coef": 0.001}}
    config |= {"objective": {"name": "grpo"}, "optim": {"learning_rate": 1e-4}}
    (workdir / "config.json").write_text(json.dumps(config))
    environment = {"python": "3.11.2", "jax": "0.10.2", "devices": ["cpu:0"], "platform": "cpu"}
    (workdir / "environment.json").write_text(json.dumps(environment))
    return workdir


def dump_lines(path: Path, rows: list[dict]) -> None:
    """One JSON object per line."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def _group(rng: random.Random, skill: float, index: int, echo: bool) -> dict:
    # Some prompts are easy, some hopeless, so that groups of all three kinds occur.
    chance = min(1.0, max(0.0, skill + (index % 5 - 2) * 0.45))
    correct = sum(rng.random() < chance for _ in range(GROUP_SIZE))
    clip = echo and correct > 0
    truncated = int(rng.random() < 0.1)
    return {
        "index": index,
        "correct": correct,
        "size": GROUP_SIZE,
        "truncated": truncated,
        "clip": clip,
    }


def _metrics(rng, step, progress, skill, groups, evaluated, echo) -> dict:
    share = lambda hit: sum(map(hit, groups)) / len(groups)  # noqa: E731
    noise = rng.gauss(0, 0.02)
    row = {
        "step": step,
        "reward/mean": skill + noise,
        "reward/correct": skill + noise,
        "group/all_success_fraction": share(lambda g: g["correct"] == g["size"]),
        "group/all_failure_fraction": share(lambda g: g["correct"] == 0),
        "loss/policy": -0.01 + noise / 10,
        "loss/echo": 0.4 - 0.2 * progress + noise if echo else 0.0,
        "loss/total": -0.01 + noise / 10,
        "echo/clips": sum(g["clip"] for g in groups),
        "echo/clip_tokens_mean": 14 + 20 * noise,
        "echo/step_entropy_mean": 0.5 - 0.2 * progress + noise,
        "entropy/token_mean": (0.4 if echo else 0.3) * math.exp(-2 * progress) + 0.05 + noise / 5,
        "completion/length_mean": 24 + 6 * progress + 10 * noise,
        "completion/truncated_fraction": max(0.0, 0.05 + noise / 3),
        "kl/ref": 0.02 * progress + abs(noise) / 20,
        "ratio/clip_fraction": abs(noise) / 5,
        "rollout/logprob_gap_max": 1e-5 + abs(noise) / 1e4,
        "train/rows_skipped_fraction": 0.2 + 0.3 * progress + noise,
        "optim/grad_norm": 0.6 + noise,
        "optim/learning_rate": 1e-4,
        "time/rollout_s": 0.9 + noise,
        "time/grade_s": 0.05,
        "time/update_s": 0.7 + noise,
        "rollout/tokens_per_second": 9000 + 4000 * noise,
        "train/tokens_per_second": 12000 + 4000 * noise,
        "memory/peak_bytes": 1.2e9,
        "compile/count": 3,
    }
    if evaluated:
        row["eval/countdown/pass@1"] = skill + rng.gauss(0, 0.01)
    return row


def sample_group(rng, step, group, index, skill, echo) -> list[dict]:
    """The rollouts of one group; the clip ends at the most surprising step of a success."""
    rows = [_rollout(rng, step, group, index, skill) for _ in range(GROUP_SIZE)]
    scores = [r["reward"] for r in rows]
    best = None
    for i, row in enumerate(rows):
        row["advantage"] = row["reward"] - sum(scores) / len(scores)
        if row["correct"]:
            for s, h in enumerate(row["step_entropy"]):
                if best is None or h > best[0]:
                    best = (h, i, s)
    if echo and best is not None:
        _, i, s = best
        rows[i]["clip_step"] = s
        rows[i]["clip_tokens"] = sum(step_id <= s for step_id in rows[i]["step_ids"])
    return rows


def _rollout(rng, step, group, index, skill) -> dict:
    lines = []
    for _ in range(rng.randint(2, 4)):
        a, b = rng.randint(1, 29), rng.randint(1, 29)
        lines.append(f"{a}*{b}={a * b}")
    text = "\n".join(lines)
    tokens = [*text, "<eos>"]
    entropy = [round(rng.expovariate(4), 4) for _ in tokens]
    step_ids, current = [], 0
    for token in tokens:
        step_ids.append(current)
        current += token == "\n"
    means = []
    for s in range(current + 1):
        own = [h for h, i in zip(entropy, step_ids, strict=True) if i == s]
        means.append(sum(own) / len(own))
    correct = rng.random() < skill + (index % 5 - 2) * 0.45
    return {
        "step": step,
        "group": group,
        "row": index,
        "data_source": "countdown",
        "prompt": f"{index} 7 12>33=",
        "response": text,
        "reward": float(correct),
        "correct": correct,
        "reason": "reaches 33" if correct else "reaches 32, not 33",
        "truncated": False,
        "advantage": 0.0,
        "tokens": tokens,
        "entropy": entropy,
        "logprobs": [-h / 2 for h in entropy],
        "step_ids": step_ids,
        "step_entropy": means,
        "clip_tokens": 0,
        "clip_step": -1,
    }
