"""Where EchoClips end: their place in the response, their length, and what token closes them."""

import dataclasses
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

from echorl_jax.tools.report.headline import number, share
from echorl_jax.tools.report.panels import Panel, Section, Series, rounded
from echorl_jax.tools.report.runs import integer, is_number

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


def histogram(values: Sequence[float], *, low: float, high: float, bins: int = BINS) -> list[int]:
    """Counts in equal bins over ``[low, high]``; values outside go to the nearest bin.

    >>> histogram([0.0, 0.4, 1.0, 2.0], low=0.0, high=1.0, bins=2)
    [2, 2]
    """
    counts = [0] * bins
    for value in values:
        place = int((value - low) / (high - low) * bins) if high > low else 0
        counts[min(bins - 1, max(0, place))] += 1
    return counts


def _row(name: str, s: ClipStatistics) -> list[str]:
    cells = [f"{s.clips:,}", number(s.tokens_mean), number(s.tokens_median), number(s.steps_mean)]
    return [name, *cells, share(s.place_mean), share(s.whole_share), share(s.first_step_share)]


def _place_panel(clips: Sequence[Clip]) -> Panel:
    counts = histogram([clip.place for clip in clips], low=0.0, high=1.0)
    middles = [(i + 0.5) / BINS for i in range(BINS)]
    shares = [rounded(n / len(clips)) for n in counts]
    note = "Share of clips by how much of the response they cover."
    series = [Series("", shares, paint="bars")]
    return Panel("Where in the response", middles, series, note, "share", "part of the response")


def _length_panel(clips: Sequence[Clip]) -> Panel:
    longest = max(clip.tokens for clip in clips)
    width = -(-longest // BINS)
    counts = histogram([c.tokens - 1 for c in clips], low=0, high=width * BINS)
    middles = [i * width + (width + 1) / 2 for i in range(BINS)]
    shares = [rounded(n / len(clips)) for n in counts]
    series = [Series("", shares, paint="bars")]
    return Panel("How long", middles, series, "Share of clips by length.", "share", "tokens")
