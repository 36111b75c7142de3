"""The EchoClip viewer: chooses and packs sampled rollouts, and describes where clips end.

The viewer reads files that are evenly spread over the run, the first and the last included: as many
as leave room for at least one group each. So a small page still shows every phase of training.
"""

import dataclasses
import itertools
import json
import re
import statistics
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from echorl_jax.files import finite, read_jsonl
from echorl_jax.tools.report.curves import Panel, Section, Series, rounded
from echorl_jax.tools.report.headline import number, share
from echorl_jax.tools.report.ledger import spread
from echorl_jax.tools.report.runs import Run, integer, is_number

Row = dict[str, Any]
BINS = 20
ENDINGS = 8  # last tokens of clips that the table lists
PAGE_BYTES = 5_000_000  # of JSON in the page
MAX_FILES = 60
READ_BYTES = 150_000_000  # of sample files
MAX_TOKENS = 3_000  # shown of one rollout
MAX_PICTURES = 8  # of one prompt
PICTURE_CHARACTERS = 60_000  # of a thumbnail's base64
_BASE64 = re.compile(r"[A-Za-z0-9+/]+={0,2}")
# Control characters except tab and newline; zero-width marks; the marks that turn the direction of
# text; line and paragraph separators; halves of surrogate pairs; the byte-order mark.
_HIDDEN = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u00ad\u061c\u200b\u200e\u200f\u2028-\u202e\u2060-\u2069\ufeff\ud800-\udfff]"
)


def visible(text: str) -> str:
    """Replaces characters that would hide or reorder others.

    C0 controls become their Unicode control pictures, the others ``<U+XXXX>`` in single angle
    quotation marks.

    >>> visible("a\\x00b\\u202ec")
    'a␀b‹U+202E›c'
    """

    def shown(match: re.Match[str]) -> str:
        code = ord(match[0])
        if code < 0x20:
            return chr(0x2400 + code)
        return "␡" if code == 0x7F else f"‹U+{code:04X}›"

    return _HIDDEN.sub(shown, text)


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


def clip_of(row: Row) -> Row | None:
    """The clip of one row of a samples file; None if it has none.

    Returns:
      ``training_step``; ``tokens``, those of the clip, of ``length`` in the response; ``step``, the
      last step in it (from 0) of ``steps``; ``ending``, the text of its last token ("" if it is the
      whole response); ``place``, tokens / length; ``whole``, true if it is the whole response.
    """
    tokens, count = row.get("tokens"), integer(row.get("clip_tokens"))
    if not isinstance(tokens, list) or not tokens or not count or count < 0:
        return None
    length = len(tokens)
    clip = min(count, length)
    ids = row.get("step_ids")
    ids = [int(i) for i in ids if is_number(i) and i >= 0] if isinstance(ids, list) else []
    return {
        "training_step": integer(row.get("step")) or 0,
        "tokens": clip,
        "length": length,
        "step": integer(row.get("clip_step")) or 0,
        "steps": max(ids, default=0) + 1,
        "ending": str(tokens[clip - 1]) if clip < length else "",
        "place": clip / length,
        "whole": clip == length,
    }


def all_clips(run: Run) -> list[Row]:
    """The clips in every samples file of a run, in order of steps."""
    rows = (row for step, path in run.sample_files() for row in _read_samples(path, step))
    return [clip for row in rows if (clip := clip_of(row)) is not None]


def clip_statistics(clips: Sequence[Row]) -> Row:
    """Means over at least one clip.

    Returns:
      ``tokens_mean`` and ``tokens_median`` of a clip, ``steps_mean`` in it, ``place_mean`` (the
      share of the response it covers), ``whole_share`` (clips that are the whole response) and
      ``first_step_share`` (clips that end with the response's first step).
    """
    tokens = [clip["tokens"] for clip in clips]
    return {
        "tokens_mean": sum(tokens) / len(tokens),
        "tokens_median": statistics.median(tokens),
        "steps_mean": sum(clip["step"] + 1 for clip in clips) / len(clips),
        "place_mean": sum(clip["place"] for clip in clips) / len(clips),
        "whole_share": sum(clip["whole"] for clip in clips) / len(clips),
        "first_step_share": sum(clip["step"] == 0 for clip in clips) / len(clips),
    }


def clip_section(clips: Sequence[Row]) -> Section | None:
    """The report's section: place, length and last token of clips, early and late in training."""
    if not clips:
        return None
    ordered = sorted(clips, key=lambda clip: clip["training_step"])
    parts = {"all": ordered}
    if (third := len(ordered) // 3) >= 10:
        parts |= {"first third": ordered[:third], "last third": ordered[-third:]}
    columns = ["Clips", "Number", "Mean length", "Median", "Steps", "Share of the response"]
    columns += ["Whole response", "Only its first step"]
    table = []
    for name, part in parts.items():
        *counts, place, whole, first = clip_statistics(part).values()
        cells = [*map(number, counts), *map(share, (place, whole, first))]
        table.append([name, f"{len(part):,}", *cells])
    tables = [(columns, table)]
    endings = Counter(clip["ending"] for clip in ordered if not clip["whole"])
    if endings:
        columns = ["Last token of clips that stop early", "Clips", "Share of all"]
        common = endings.most_common(ENDINGS)
        rows = [[repr(text)[1:-1], f"{n:,}", share(n / len(clips))] for text, n in common]
        tables.append((columns, rows))
    notes = (f"From the {len(clips):,} clips among the samples that were read.",)
    width = -(-max(clip["tokens"] for clip in clips) // BINS)
    covered, lengths = [c["place"] for c in ordered], [c["tokens"] - 1 for c in ordered]
    shares = [(i + 0.5) / BINS for i in range(BINS)]
    tokens = [i * width + (width + 1) / 2 for i in range(BINS)]
    cover, length = "Clips by how much of the response they cover.", "Clips by length."
    panels = [
        Panel("Where in the response", shares, _bars(covered, 1), cover, "share", "covered part"),
        Panel("How long", tokens, _bars(lengths, width * BINS), length, "share", "tokens"),
    ]
    return Section("clips", "Where clips end", panels, notes, tables)


def _bars(values: list[float], limit: float) -> list[Series]:
    counts, _ = np.histogram(values, BINS, range=(0, limit))
    return [Series("", [rounded(n / len(values)) for n in counts], paint="bars")]


@dataclasses.dataclass(frozen=True)
class Viewer:
    """The shown groups, the number of groups left out, and the clips of all that were read."""

    groups: list[Row]
    files: int
    files_read: int
    groups_left_out: int
    entropy_scale: float  # nats at which the shading is full
    clips: tuple[Row, ...] = ()


def build_viewer(run: Run, *, page_bytes: int = PAGE_BYTES) -> Viewer:
    """Reads and packs as many of a run's samples as fit; the viewer is empty if there are none."""
    files = run.sample_files()
    chosen = _choose(files, page_bytes)
    kept: list[Row] = []
    clips: list[Row] = []
    left_out = used = 0
    for done, (step, path) in enumerate(chosen, start=1):
        for rows in read_groups(path, step):
            clips += [clip for row in rows if (clip := clip_of(row)) is not None]
            group = pack_group(rows)
            size = len(embed_json(group))
            # Files may also use the room that earlier ones have left.
            if used + size <= page_bytes * done // len(chosen):
                used += size
                kept.append(group)
            else:
                left_out += 1
    kept.sort(key=lambda group: (group["step"], group["group"] or 0))
    values = sorted(v for g in kept for r in g["rollouts"] for v in r["entropy"])
    # Shading is full from the 98th percentile on; rare high values would make the rest pale.
    scale = max(0.05, values[int(0.98 * (len(values) - 1))] / 100) if values else 1.0
    return Viewer(kept, len(files), len(chosen), left_out, scale, tuple(clips))


def read_groups(path: Path, step: int) -> list[list[Row]]:
    """The rows of a samples file, one list per group; rows without text are left out."""
    groups: dict[str, list[Row]] = {}
    for row in _read_samples(path, step):
        if isinstance(row.get("response"), str) or isinstance(row.get("tokens"), list):
            groups.setdefault(str(row.get("group")), []).append(row)
    return list(groups.values())


def pack_group(rows: Sequence[Row]) -> Row:
    """One group for the page: ``outcome`` is ``mixed``, ``right`` or ``wrong``."""
    verdicts = [pack_verdict(row) for row in rows]
    right, judged = verdicts.count(True), len(rows) - verdicts.count(None)
    first = rows[0]
    return {
        "step": first["step"],
        "group": integer(first.get("group")),
        "source": visible(str(first.get("data_source") or "")),
        "prompt": visible(str(first.get("prompt") or "")),
        "pictures": pack_pictures(first.get("pictures")),
        "outcome": "wrong" if right == 0 else "right" if right == judged else "mixed",
        "right": right,
        "rollouts": [pack_rollout(row) for row in rows],
    }


def pack_pictures(given: Any) -> list[str]:
    """The thumbnails of a prompt, JPEG as base64; anything else is left out."""
    texts = [text for text in given if isinstance(text, str)] if isinstance(given, list) else []
    fitting = [text for text in texts if len(text) <= PICTURE_CHARACTERS]
    return [text for text in fitting if _BASE64.fullmatch(text)][:MAX_PICTURES]


def pack_verdict(row: Row) -> bool | None:
    """True if the rollout is right; None where the run wrote null: it was not judged."""
    correct = row.get("correct", False)
    return None if correct is None else bool(correct)


def pack_rollout(row: Row) -> Row:
    """One rollout: tokens, their entropy in hundredths of a nat, their steps, and the clip.

    A row without tokens is shown as one piece of text; entropies and steps are shown if there is
    one for each token.
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
        **{k: row.get(k) if is_number(row.get(k)) else None for k in ("reward", "advantage")},
        "correct": pack_verdict(row),
        "truncated": bool(row.get("truncated")),
        "reason": visible(str(row.get("reason") or "")),
        "length": len(tokens),
        "tokens": [visible(str(token)) for token in tokens[:shown]],
        "entropy": [round(100 * value) for value in entropy[:shown]],
        "steps": _steps(ids[:shown], entropy, means if isinstance(means, list) else []),
        "clip_tokens": clip_tokens,
    }


def _steps(ids: list[float], entropy: list[float], means: list[Any]) -> list[list[Any]]:
    """``[end, mean entropy or None]`` per step, ``end`` being the token after its last."""
    # A masked token belongs to the step before it.
    joined = list(itertools.accumulate(map(int, ids), lambda last, i: i if i >= 0 else last))
    steps, end = [], 0
    for step, tokens in itertools.groupby(joined):
        start, end = end, end + len(list(tokens))
        logged = means[step] if 0 <= step < len(means) else None
        own = entropy[start:end]
        value = logged if is_number(logged) else sum(own) / len(own) if own else None
        steps.append([end, None if value is None else round(value, 4)])
    return steps


def _read_samples(path: Path, step: int) -> Iterator[Row]:
    """The rows of a samples file; those without a step get the one in the file's name."""
    for row in read_jsonl(path):
        logged = integer(row.get("step"))
        yield row | {"step": step if logged is None else logged}


def _choose(files: list[tuple[int, Path]], page_bytes: int) -> list[tuple[int, Path]]:
    """Chooses files evenly over the run, as many as fit; the middle one gives the size."""
    if not files:
        return []
    step, path = files[len(files) // 2]
    sizes = [len(embed_json(pack_group(rows))) for rows in read_groups(path, step)]
    by_page = page_bytes * len(sizes) // max(1, sum(sizes)) if sizes else MAX_FILES
    by_disk = READ_BYTES // max(1, path.stat().st_size)
    return spread(files, max(2, min(MAX_FILES, by_page, by_disk)))


def _numbers(values: Any, count: int) -> list[float]:
    if not isinstance(values, list) or len(values) != count:
        return []
    return [float(v) if is_number(v) else 0.0 for v in values]
