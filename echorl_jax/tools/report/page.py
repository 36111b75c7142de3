"""Writes the report of a run: one HTML file with every curve and a viewer of EchoClips.

It needs no network. The page's parts live beside this module: ``report.html.jinja``,
``report.css``, the scripts ``charts.js``, ``ledger.js`` and ``viewer.js``, and uPlot (MIT licence),
which draws the curves. A content security policy lists the scripts by their hashes, so the page can
neither fetch anything nor run a script that came with the data.
"""

import base64
import dataclasses
import hashlib
import os
from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import Any

import jinja2

from echorl_jax.config import Config
from echorl_jax.errors import writing
from echorl_jax.tools.report import curves, headline, studies
from echorl_jax.tools.report.curves import Section
from echorl_jax.tools.report.entropy_decay import collapse_section, law_section
from echorl_jax.tools.report.golden_entropy import profile_section
from echorl_jax.tools.report.ledger import Visit, build_ledger, read_ledger
from echorl_jax.tools.report.runs import Run, read_jsonl, read_runs
from echorl_jax.tools.report.step_deletion import deletion_section
from echorl_jax.tools.report.viewer import Viewer, build_viewer, clip_section, embed_json, visible

_SCRIPTS = ("uplot.min.js", "charts.js", "ledger.js", "viewer.js")
_STYLES = ("uplot.min.css", "report.css")
_FIRST = ("learning", "signal")


def write_report(workdir: Path, *, compare: tuple[Path, ...] = (), out: Path | None = None) -> Path:
    """Writes the report of a working directory and returns the file's path.

    Args:
      workdir: the run the report is about. Files that are missing or torn leave their part of the
        page out.
      compare: working directories of other runs, overlaid in the curves.
      out: where to write; ``workdir/report.html`` by default. It is replaced in one piece.

    Raises:
      ConfigError: a given working directory does not exist.
    """
    runs = read_runs([Path(workdir), *compare])
    out = Path(out) if out is not None else Path(workdir) / "report.html"
    return _replace(out, render(runs))


def write_page(out: Path, title: str, sections: Sequence[Section], *, headline: str) -> Path:
    """Writes a page of sections alone, about no single run, and returns the file's path."""
    return _replace(out, _render(title, headline, sections))


def render(runs: Sequence[Run]) -> str:
    """The page as text; the first run is the one it is about.

    A directory that holds studies but no run gives a page of these alone.
    """
    run = runs[0]
    visits = read_ledger(run.ledger_file)
    ledger = build_ledger(visits)
    viewer = build_viewer(run)
    name_prompts(viewer.groups, visits)
    sections = page_sections(runs, viewer)
    if sections and not (run.metrics or run.config or ledger or viewer.groups):
        return _render(run.name, ", ".join(section.title for section in sections), sections)
    changed = [
        [f"{section}.{key}" if section else key, value]
        for section, rows in config_table(run.config, top="")
        for key, value, differs in rows
        if differs
    ]
    return _render(
        run.name,
        headline.headline(run),
        sections,
        ledger=ledger,
        viewer=viewer,
        span=curves.thinned_steps(runs),
        # Supervised training samples nothing: its page has no parts about groups and clips.
        samples_rollouts=bool(
            ledger or viewer.groups or "reward/mean" in run.keys() or not run.metrics
        ),
        about_run=True,
        progress=headline.progress(run),
        facts=[dataclasses.asdict(fact) for fact in headline.facts(run)],
        runs=[other.name for other in runs],
        comparison=headline.comparison(runs) if len(runs) > 1 else None,
        differences=config_differences(runs),
        notes=[f"{r.name}: {note}" if len(runs) > 1 else note for r in runs for note in r.notes],
        config=config_table(run.config),
        changed=changed,
        environment=config_table(run.environment, defaults={}, top="environment"),
    )


# What the template gets where a page is about no run.
_NOTHING: dict[str, Any] = {
    "about_run": False,
    "samples_rollouts": False,
    "progress": "",
    "comparison": None,
    **dict.fromkeys(
        ("facts", "runs", "differences", "notes", "config", "changed", "environment"), ()
    ),
}


def _render(
    title: str,
    words: str,
    sections: Sequence[Section],
    *,
    ledger: dict[str, Any] | None = None,
    viewer: Viewer | None = None,
    span: int = 1,
    **parts: Any,
) -> str:
    viewer = viewer or Viewer([], 0, 0, 0, 1.0)
    headings = [_heading(number, section) for number, section in enumerate(sections)]
    # Everything that is not in the data block passes through here: names of runs, config values,
    # notes.
    text: dict[str, Any] = _visible_text(
        _NOTHING | parts | {"title": title, "headline": words, "sections": headings}
    )
    scripts = [_asset(name) for name in _SCRIPTS]
    styles = [_asset(name) for name in _STYLES]
    page = _environment().get_template("report.html.jinja")
    return page.render(
        **text,
        # The method's own pictures come right after what was learned.
        first=[s for s in text["sections"] if s["id"] in _FIRST],
        rest=[s for s in text["sections"] if s["id"] not in _FIRST],
        span=span,
        ledger=ledger,
        viewer=viewer,
        scripts=scripts,
        styles=styles,
        policy=_policy(scripts, styles),
        data=embed_json(
            {
                "sections": _visible_text([section.payload() for section in sections]),
                "ledger": ledger,
                "viewer": viewer.payload(),
            }
        ),
    )


def _replace(out: Path, page: str) -> Path:
    """Writes a file so that nobody ever reads half of it."""
    with writing(out):
        out.parent.mkdir(parents=True, exist_ok=True)
        unfinished = out.with_name(out.name + ".part")
        unfinished.write_text(page, encoding="utf-8")
        os.replace(unfinished, out)
    return out


def name_prompts(groups: Sequence[dict[str, Any]], visits: Sequence[Visit]) -> None:
    """Adds ``prompt_index``, the prompt's number in the data, to each sampled group.

    A samples file numbers groups within their step; the ledger lists a step's groups in that order.
    """
    steps: dict[int, list[Visit]] = {group["step"]: [] for group in groups}
    for visit in visits:
        if visit.step in steps:
            steps[visit.step].append(visit)
    for group in groups:
        own, place = steps[group["step"]], group["group"]
        listed = isinstance(place, int) and 0 <= place < len(own)
        group["prompt_index"] = own[place].index if listed else None


def page_sections(runs: Sequence[Run], viewer: Viewer) -> list[Section]:
    """The curves, then every study there is data for, in the order of the page.

    Studies that need a model are not made here: ``analysis/trajectories.jsonl`` and
    ``analysis/deletion.jsonl`` in the working directory are shown where they exist.
    """
    plots = curves.build_sections(runs)
    others = [section for section in plots if section.folded]
    folder = runs[0].path / studies.FOLDER
    made = [
        collapse_section(runs),
        law_section(runs),
        clip_section(viewer.clips),
        profile_section(list(read_jsonl(folder / studies.TRAJECTORIES))),
        deletion_section(list(read_jsonl(folder / studies.DELETION))),
    ]
    shown = [section for section in plots if not section.folded]
    return [section for section in (*shown, *made, *others) if section is not None]


def config_table(
    config: dict[str, Any], *, defaults: dict[str, Any] | None = None, top: str = "run"
) -> list[tuple[str, list[tuple[str, str, bool]]]]:
    """Sections of a config: ``[(section, [(key, value, differs from default), ...]), ...]``.

    Args:
      config: options, some of them grouped in sections.
      defaults: the same with the defaults; those of :class:`Config` if None.
      top: what the section of the ungrouped options is called.
    """
    defaults = dataclasses.asdict(Config()) if defaults is None else defaults
    ungrouped = {key: value for key, value in config.items() if not isinstance(value, dict)}
    sections = [(top, ungrouped)] if ungrouped else []
    sections += [(key, value) for key, value in config.items() if isinstance(value, dict)]
    table = []
    for section, values in sections:
        known = defaults if values is ungrouped else defaults.get(section, {})
        rows = [
            (key, _plain(value), key in known and _plain(value) != _plain(known[key]))
            for key, value in values.items()
        ]
        table.append((section, rows))
    return table


def config_differences(runs: Sequence[Run]) -> list[list[str]]:
    """The config keys in which runs differ: ``[["echo.enabled", value of each run ...], ...]``."""
    flat = [
        {
            f"{section}.{key}" if section else key: value
            for section, rows in config_table(run.config, top="")
            for key, value, _ in rows
        }
        for run in runs
    ]
    keys = dict.fromkeys(key for values in flat for key in values)
    rows = [[key, *(values.get(key, "–") for values in flat)] for key in keys]
    return [row for row in rows if len(set(row[1:])) > 1]


def _heading(number: int, section: Section) -> dict[str, Any]:
    return {
        "number": number,
        "id": section.id,
        "title": section.title,
        "count": len(section.panels),
        "notes": section.notes,
        "tables": section.tables,
        "folded": section.folded,
    }


def _environment() -> jinja2.Environment:
    return jinja2.Environment(
        loader=jinja2.PackageLoader("echorl_jax", "tools/report"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )


def _asset(name: str) -> str:
    return resources.files("echorl_jax.tools.report").joinpath(name).read_text(encoding="utf-8")


def _policy(scripts: Sequence[str], styles: Sequence[str]) -> str:
    return (
        f"default-src 'none'; script-src {_hashes(scripts)}; style-src {_hashes(styles)}; "
        "base-uri 'none'; form-action 'none'"
    )


def _hashes(blocks: Sequence[str]) -> str:
    digests = (hashlib.sha256(block.encode()).digest() for block in blocks)
    return " ".join(f"'sha256-{base64.b64encode(digest).decode()}'" for digest in digests)


def _visible_text(value: Any) -> Any:
    if isinstance(value, str):
        return visible(value)
    if isinstance(value, dict):
        return {key: _visible_text(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_visible_text(item) for item in value]
    return value


def _plain(value: Any) -> str:
    if value is None:
        return "none"
    if isinstance(value, list | tuple):
        return ", ".join(_plain(item) for item in value) or "none"
    if isinstance(value, dict):
        return ", ".join(f"{key} {_plain(item)}" for key, item in value.items()) or "none"
    return (
        {True: "yes", False: "no"}.get(value, str(value)) if isinstance(value, bool) else str(value)
    )
