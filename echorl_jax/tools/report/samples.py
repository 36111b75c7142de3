"""Chooses and packs sampled rollouts for the EchoClip viewer, within a budget of bytes.

Files are taken evenly over the run, first and last among them, as many as leave room for at least
one group each; only those are read. So a small page still shows every phase of training.
"""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from echorl_jax.tools.report.clips import Clip, clip_of
from echorl_jax.tools.report.ledger import spread
from echorl_jax.tools.report.runs import Run, integer, is_number, read_jsonl
from echorl_jax.tools.report.text import embed_json, visible

# Bytes of JSON in the page; sample files looked into, and their bytes on disk; tokens shown of one
# rollout.
PAGE_BYTES = 5_000_000
MAX_FILES = 60
READ_BYTES = 150_000_000
MAX_TOKENS = 3_000


@dataclasses.dataclass(frozen=True)
class Viewer:
    """What the viewer shows, what it leaves out, and the clips of everything that was read."""

    groups: list[dict[str, Any]]
    files: int
    files_read: int
    groups_left_out: int
    entropy_scale: float  # nats at which the shading is full
    clips: tuple[Clip, ...] = ()

    def payload(self) -> dict[str, Any]:
        """The part that goes into the page."""
        return {"groups": self.groups, "entropy_scale": self.entropy_scale}


def build_viewer(run: Run, *, page_bytes: int = PAGE_BYTES) -> Viewer:
    """Reads and packs what fits of a run's samples; an empty viewer where there are none."""
    files = run.sample_files()
    chosen = _choose(files, page_bytes)
    kept: list[dict[str, Any]] = []
    clips: list[Clip] = []
    left_out = used = 0
    for number, (step, path) in enumerate(chosen, start=1):
        for rows in read_groups(path, step):
            clips += [clip for row in rows if (clip := clip_of(row)) is not None]
            group = pack_group(rows)
            size = len(embed_json(group))
            # What earlier files did not need is there for later ones.
            if used + size <= page_bytes * number // len(chosen):
                used += size
                kept.append(group)
            else:
                left_out += 1
    kept.sort(key=lambda group: (group["step"], group["group"] or 0))
    return Viewer(kept, len(files), len(chosen), left_out, _entropy_scale(kept), tuple(clips))


def read_groups(path: Path, step: int) -> list[list[dict[str, Any]]]:
    """The rows of a samples file, one list per group; rows without text are left out."""
    groups: dict[str, list[dict[str, Any]]] = {}
    for row in read_jsonl(path):
        if isinstance(row.get("response"), str) or isinstance(row.get("tokens"), list):
            logged = integer(row.get("step"))
            row["step"] = step if logged is None else logged
            groups.setdefault(str(row.get("group")), []).append(row)
    return list(groups.values())


def pack_group(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """One group as the page needs it: ``outcome`` is ``mixed``, ``right`` or ``wrong``."""
    right = sum(bool(row.get("correct")) for row in rows)
    first = rows[0]
    return {
        "step": first["step"],
        "group": integer(first.get("group")),
        "source": visible(str(first.get("data_source") or "")),
        "prompt": visible(str(first.get("prompt") or "")),
        "outcome": "wrong" if right == 0 else "right" if right == len(rows) else "mixed",
        "right": right,
        "rollouts": [pack_rollout(row) for row in rows],
    }


def pack_rollout(row: dict[str, Any]) -> dict[str, Any]:
    """One rollout: tokens, their entropy in hundredths of a nat, their steps, and the clip.

    A row without tokens is shown as one piece of text; values that do not match the tokens in
    number are not shown.
    """
    tokens = row.get("tokens")
    if not isinstance(tokens, list) or not tokens:
        tokens = [row.get("response") or ""]
    clip_tokens = max(0, integer(row.get("clip_tokens")) or 0)
    shown = min(len(tokens), max(MAX_TOKENS, clip_tokens))
    entropy = _numbers(row.get("entropy"), len(tokens))
    ids = _numbers(row.get("step_ids"), len(tokens)) or [0.0] * len(tokens)
    means = row.get("step_entropy")
    return {
        "reward": row.get("reward") if is_number(row.get("reward")) else None,
        "advantage": row.get("advantage") if is_number(row.get("advantage")) else None,
        "correct": bool(row.get("correct")),
        "truncated": bool(row.get("truncated")),
        "reason": visible(str(row.get("reason") or "")),
        "length": len(tokens),
        "tokens": [visible(str(token)) for token in tokens[:shown]],
        "entropy": [round(100 * value) for value in entropy[:shown]],
        "steps": _steps(ids, entropy, means if isinstance(means, list) else [], shown),
        "clip_tokens": clip_tokens,
    }


def _steps(ids: list[float], entropy: list[float], means: list[Any], shown: int) -> list[list[Any]]:
    """``[end, mean entropy or None]`` per step, ``end`` being the token after its last."""
    bounds: list[list[int]] = []
    for position, raw in enumerate(ids[:shown]):
        # A masked position has no step of its own: it stays with what came before.
        step = int(raw) if raw >= 0 or not bounds else bounds[-1][0]
        if not bounds or bounds[-1][0] != step:
            bounds.append([step, position])
        bounds[-1][1] = position + 1
    steps, start = [], 0
    for step, end in bounds:
        own = entropy[start:end]
        logged = means[step] if 0 <= step < len(means) else None
        value = logged if is_number(logged) else sum(own) / len(own) if own else None
        steps.append([end, round(value, 4) if value is not None else None])
        start = end
    return steps


def _choose(files: list[tuple[int, Path]], page_bytes: int) -> list[tuple[int, Path]]:
    """Files evenly over the run, as many as there is room for, judged by the middle one."""
    if not files:
        return []
    step, path = files[len(files) // 2]
    sizes = [len(embed_json(pack_group(rows))) for rows in read_groups(path, step)]
    by_page = page_bytes * len(sizes) // max(1, sum(sizes)) if sizes else MAX_FILES
    by_disk = READ_BYTES // max(1, path.stat().st_size)
    return spread(files, max(2, min(MAX_FILES, by_page, by_disk)))


def _entropy_scale(groups: list[dict[str, Any]]) -> float:
    values = sorted(v for g in groups for r in g["rollouts"] for v in r["entropy"])
    # A rare very surprising token must not make all the others look pale.
    return max(0.05, values[int(0.98 * (len(values) - 1))] / 100) if values else 1.0


def _numbers(values: Any, count: int) -> list[float]:
    if not isinstance(values, list) or len(values) != count:
        return []
    return [float(v) if is_number(v) else 0.0 for v in values]
