"""The EchoClip viewer: chooses and packs sampled rollouts, and describes where clips end.

Files are taken evenly over the run, the first and the last included, as many as leave room for at
least one group each; only those are read. A small page still shows every phase of training.
"""

import dataclasses
import json
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from echorl_jax.tools.report.curves import Panel, Section, Series, rounded
from echorl_jax.tools.report.headline import number, share
from echorl_jax.tools.report.ledger import spread
from echorl_jax.tools.report.runs import Run, finite, integer, is_number, read_jsonl

# Control characters except tab and newline; zero-width marks; the marks that turn the direction of
# text; line and paragraph separators; halves of surrogate pairs; the byte-order mark.
_HIDDEN = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u00ad\u061c\u200b\u200e\u200f\u2028-\u202e\u2060-\u2069\ufeff\ud800-\udfff]"
)


def visible(text: str) -> str:
    """Replaces characters that would hide or reorder others by a picture or their code point.

    C0 controls become their Unicode control pictures, the others ``<U+XXXX>`` in single angle
    quotation marks.

    >>> visible("a\\x00b\\u202ec")
    'a␀b‹U+202E›c'
    """
    return _HIDDEN.sub(_shown, text)


def embed_json(value: Any) -> str:
    r"""JSON that can stand inside an HTML ``<script type="application/json">``.

    Pure ASCII; ``<``, ``>`` and ``&`` are escaped too, so no text can end the element or open
    another. Numbers that are not finite become null.

    >>> embed_json({"a": "</script>"})
    '{"a":"\\u003c/script\\u003e"}'
    """
    try:
        text = json.dumps(value, allow_nan=False, separators=(",", ":"))
    except ValueError:
        text = json.dumps(finite(value), separators=(",", ":"))
    return text.replace("<", r"\u003c").replace(">", r"\u003e").replace("&", r"\u0026")


def _shown(match: re.Match[str]) -> str:
    code = ord(match[0])
    if code < 0x20:
        return chr(0x2400 + code)
    return "␡" if code == 0x7F else f"‹U+{code:04X}›"


BINS = 20
# Last tokens of clips that are counted one by one.
ENDINGS = 8


@dataclasses.dataclass(frozen=True)
class Clip:
    """The first ``tokens`` of ``length`` tokens, through step ``step`` (from 0) of ``steps``."""

    training_step: int
    tokens: int
    length: int
    step: int
    steps: int
    ending: str  # text of the clip's last token; "" where the clip is the whole response

    @property
    def place(self) -> float:
        """Where in the response the clip ends, from 0 to 1."""
        return self.tokens / self.length

    @property
    def whole(self) -> bool:
        """Whether the clip is the whole response."""
        return self.tokens >= self.length


@dataclasses.dataclass(frozen=True)
class ClipStatistics:
    """Means over clips; lengths in tokens."""

    clips: int
    tokens_mean: float
    tokens_median: float
    place_mean: float  # share of the response that the clip covers
    whole_share: float  # clips that are the whole response
    first_step_share: float  # clips that end with the response's first step
    steps_mean: float  # steps in a clip
    # Commonest last tokens of clips that are not the whole response, with their counts.
    endings: tuple[tuple[str, int], ...]


def clip_of(row: dict[str, Any]) -> Clip | None:
    """The clip of one row of a samples file; None where it has none."""
    tokens, count = row.get("tokens"), integer(row.get("clip_tokens"))
    if not isinstance(tokens, list) or not tokens or not count or count < 0:
        return None
    length = len(tokens)
    clip = min(count, length)
    ids = [int(i) for i in row.get("step_ids") or [] if is_number(i) and i >= 0]
    return Clip(
        training_step=integer(row.get("step")) or 0,
        tokens=clip,
        length=length,
        step=integer(row.get("clip_step")) or 0,
        steps=max(ids) + 1 if ids else 1,
        ending=str(tokens[clip - 1]) if clip < length else "",
    )


def clip_statistics(clips: Iterable[Clip]) -> ClipStatistics | None:
    """Summarises clips, keeping the ``ENDINGS`` commonest last tokens; None without clips."""
    found = list(clips)
    if not found:
        return None
    count = len(found)
    lengths = sorted(clip.tokens for clip in found)
    common = Counter(clip.ending for clip in found if not clip.whole)
    return ClipStatistics(
        clips=count,
        tokens_mean=sum(lengths) / count,
        tokens_median=(lengths[(count - 1) // 2] + lengths[count // 2]) / 2,
        place_mean=sum(clip.place for clip in found) / count,
        whole_share=sum(clip.whole for clip in found) / count,
        first_step_share=sum(clip.step == 0 for clip in found) / count,
        steps_mean=sum(clip.step + 1 for clip in found) / count,
        endings=tuple(common.most_common(ENDINGS)),
    )


def clip_rows(clips: Iterable[Clip]) -> list[dict[str, Any]]:
    """One row per clip, as written to JSONL."""
    return [dataclasses.asdict(c) | {"place": c.place, "whole": c.whole} for c in clips]


def clip_section(clips: Sequence[Clip]) -> Section | None:
    """The report's section: place, length and last token of clips, early and late in training."""
    overall = clip_statistics(clips)
    if overall is None:
        return None
    ordered = sorted(clips, key=lambda clip: clip.training_step)
    third = len(ordered) // 3
    parts = [("all", overall)]
    if third >= 10:
        parts.append(("first third", clip_statistics(ordered[:third]) or overall))
        parts.append(("last third", clip_statistics(ordered[-third:]) or overall))
    columns = ["Clips", "Number", "Mean length", "Median", "Steps", "Share of the response"]
    columns += ["Whole response", "Only its first step"]
    closed = [[repr(text)[1:-1], f"{n:,}", share(n / overall.clips)] for text, n in overall.endings]
    tables = [(columns, [_row(*part) for part in parts])]
    if closed:
        tables.append((["Last token of clips that stop early", "Clips", "Share of all"], closed))
    notes = (f"From the {overall.clips:,} clips among the samples that were read.",)
    panels = [_place_panel(ordered), _length_panel(ordered)]
    return Section("clips", "Where clips end", panels, notes, tables)


def _row(name: str, s: ClipStatistics) -> list[str]:
    cells = [f"{s.clips:,}", number(s.tokens_mean), number(s.tokens_median), number(s.steps_mean)]
    return [name, *cells, share(s.place_mean), share(s.whole_share), share(s.first_step_share)]


def _place_panel(clips: Sequence[Clip]) -> Panel:
    counts, _ = np.histogram([clip.place for clip in clips], BINS, range=(0.0, 1.0))
    middles = [(i + 0.5) / BINS for i in range(BINS)]
    shares = [rounded(n / len(clips)) for n in counts]
    note = "Share of clips by how much of the response they cover."
    series = [Series("", shares, paint="bars")]
    return Panel("Where in the response", middles, series, note, "share", "part of the response")


def _length_panel(clips: Sequence[Clip]) -> Panel:
    longest = max(clip.tokens for clip in clips)
    width = -(-longest // BINS)
    counts, _ = np.histogram([c.tokens - 1 for c in clips], BINS, range=(0, width * BINS))
    middles = [i * width + (width + 1) / 2 for i in range(BINS)]
    shares = [rounded(n / len(clips)) for n in counts]
    series = [Series("", shares, paint="bars")]
    return Panel("How long", middles, series, "Share of clips by length.", "share", "tokens")


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
    for done, (step, path) in enumerate(chosen, start=1):
        for rows in read_groups(path, step):
            clips += [clip for row in rows if (clip := clip_of(row)) is not None]
            group = pack_group(rows)
            size = len(embed_json(group))
            # What earlier files did not need is there for later ones.
            if used + size <= page_bytes * done // len(chosen):
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
