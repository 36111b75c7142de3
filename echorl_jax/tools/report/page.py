"""Writes the report of a run: one HTML file with every curve and a viewer of EchoClips.

It needs no network. The sources of the page are beside this module: ``report.html.jinja``,
``report.css``, the scripts ``charts.js``, ``ledger.js`` and ``viewer.js``, and uPlot (MIT licence),
which draws the curves. A content security policy lists the scripts by their hashes, so the page can
neither fetch anything nor run a script that came with the data.
"""

import base64
import dataclasses
import hashlib
from collections.abc import Iterator, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

import jinja2

from echorl_jax.config import Config
from echorl_jax.errors import writing
from echorl_jax.files import map_leaves, read_jsonl, replace_text
from echorl_jax.tools.report import curves, headline
from echorl_jax.tools.report.curves import Section
from echorl_jax.tools.report.entropy_decay import collapse_section, law_section
from echorl_jax.tools.report.golden_entropy import profile_section
from echorl_jax.tools.report.ledger import Visit, build_ledger, read_ledger
from echorl_jax.tools.report.runs import Run, read_runs, study_file
from echorl_jax.tools.report.step_deletion import deletion_section
from echorl_jax.tools.report.viewer import Viewer, build_viewer, clip_section, embed_json, visible

_SCRIPTS = ("uplot.min.js", "charts.js", "ledger.js", "viewer.js")
_STYLES = ("uplot.min.css", "report.css")
# Sections before the ledger and the viewer; the others follow them.
_FIRST = ("learning", "signal")


def write_report(workdir: Path, *, compare: tuple[Path, ...] = (), out: Path | None = None) -> Path:
    """Writes the report of a working directory and returns the file's path.

    Args:
      workdir: the run the report is about. Missing or torn files leave their part of the page out.
      compare: working directories of other runs, overlaid in the curves.
      out: the file to write; ``workdir/report.html`` by default. It is replaced in one piece.

    Raises:
      ConfigError: a given working directory does not exist.
    """
    runs = read_runs([Path(workdir), *compare])
    return _write(Path(out or Path(workdir) / "report.html"), render(runs))


def write_page(out: Path, title: str, sections: Sequence[Section], *, headline: str) -> Path:
    """Writes a page with only these sections and no run, and returns the file's path."""
    return _write(out, _render(title, headline, sections))


def _write(out: Path, page: str) -> Path:
    with writing(out):
        out.parent.mkdir(parents=True, exist_ok=True)
        replace_text(out, page)
    return out


def render(runs: Sequence[Run]) -> str:
    """The page as text; the first run is the one it is about.

    A directory that holds studies but no run gives a page with only the studies.
    """
    run = runs[0]
    visits = read_ledger(run.path / "samples" / "ledger.jsonl")
    ledger, viewer = build_ledger(visits), build_viewer(run)
    name_prompts(viewer.groups, visits)
    sections = page_sections(runs, viewer)
    if sections and not (run.metrics or run.config or ledger or viewer.groups):
        return _render(run.name, ", ".join(section.title for section in sections), sections)
    about = {
        "ledger": ledger,
        "viewer": viewer,
        "span": curves.thinned_steps(runs),
        # Supervised training samples nothing, so its page has no parts about groups and clips.
        "has_rollouts": bool(
            ledger or viewer.groups or "reward/mean" in run.keys() or not run.metrics
        ),
        "progress": headline.progress(run),
        "facts": headline.facts(run),
        "names": [other.name for other in runs],
        "comparison": headline.comparison(runs) if len(runs) > 1 else None,
        "differences": config_differences(runs),
        "notes": [f"{r.name}: {note}" if len(runs) > 1 else note for r in runs for note in r.notes],
        "config": config_table(run.config),
        "changed": [(key, value) for key, value, differs in _options(run.config) if differs],
        "environment": config_table(run.environment, defaults={}, top="environment"),
    }
    return _render(run.name, headline.headline(run), sections, about)


def _render(
    title: str, words: str, sections: Sequence[Section], run: dict[str, Any] | None = None
) -> str:
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("echorl_jax", "tools/report"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=_visible,  # applied to every text that the template prints
    )
    scripts, styles = ([_asset(name) for name in names] for names in (_SCRIPTS, _STYLES))
    viewer = run["viewer"] if run else Viewer([], 0, 0, 0, 1.0)
    panels = [{"panels": list(map(dataclasses.asdict, section.panels))} for section in sections]
    numbered = list(enumerate(sections))
    return environment.get_template("report.html.jinja").render(
        title=title,
        headline=words,
        run=run,
        first=[entry for entry in numbered if entry[1].id in _FIRST],
        rest=[entry for entry in numbered if entry[1].id not in _FIRST],
        scripts=scripts,
        styles=styles,
        policy=f"default-src 'none'; script-src {_hashes(scripts)}; style-src {_hashes(styles)}; "
        "img-src data:; base-uri 'none'; form-action 'none'",
        data=embed_json(
            {
                "sections": map_leaves(panels, _visible),
                "ledger": run and run["ledger"],
                "viewer": {"groups": viewer.groups, "entropy_scale": viewer.entropy_scale},
            }
        ),
    )


def _visible(value: Any) -> Any:
    # Not markup: the blocks that the template marks as safe stay as they are.
    return visible(value) if type(value) is str else value


def _asset(name: str) -> str:
    return resources.files("echorl_jax.tools.report").joinpath(name).read_text(encoding="utf-8")


def _hashes(blocks: Sequence[str]) -> str:
    digests = (hashlib.sha256(block.encode()).digest() for block in blocks)
    return " ".join(f"'sha256-{base64.b64encode(digest).decode()}'" for digest in digests)


def name_prompts(groups: Sequence[dict[str, Any]], visits: Sequence[Visit]) -> None:
    """Adds ``prompt_index``, the prompt's index in the data, to each sampled group.

    A samples file numbers groups within their step; the ledger lists a step's groups in that order.
    """
    steps: dict[int, list[Visit]] = {group["step"]: [] for group in groups}
    for visit in visits:
        if visit.step in steps:
            steps[visit.step].append(visit)
    for group in groups:
        listed = dict(enumerate(steps[group["step"]]))
        group["prompt_index"] = listed[place].index if (place := group["group"]) in listed else None


def page_sections(runs: Sequence[Run], viewer: Viewer) -> list[Section]:
    """The curves, then every study there is data for, in the order of the page.

    The studies that need a model are read from ``analysis/trajectories.jsonl`` and
    ``analysis/deletion.jsonl`` in the working directory of the first run.
    """
    plots = curves.build_sections(runs)
    trajectories, deletion = (
        list(read_jsonl(study_file(runs[0].path, name))) for name in ("trajectories", "deletion")
    )
    found = [
        *(section for section in plots if not section.folded),
        collapse_section(runs),
        law_section(runs),
        clip_section(viewer.clips),
        profile_section(trajectories),
        deletion_section(deletion),
        *(section for section in plots if section.folded),
    ]
    return [section for section in found if section is not None]


def config_table(
    config: dict[str, Any], *, defaults: dict[str, Any] | None = None, top: str = "run"
) -> list[tuple[str, list[tuple[str, str, bool]]]]:
    """Sections of a config: ``[(section, [(key, value, differs from default), ...]), ...]``.

    Args:
      config: options, some of them grouped in sections.
      defaults: the same with the defaults; those of :class:`Config` if None.
      top: the name of the section with the ungrouped options.
    """
    defaults = dataclasses.asdict(Config()) if defaults is None else defaults
    ungrouped = {key: value for key, value in config.items() if not isinstance(value, dict)}
    sections = [(top, ungrouped, defaults)] if ungrouped else []
    sections += [(k, v, defaults.get(k, {})) for k, v in config.items() if isinstance(v, dict)]
    return [
        (
            section,
            [
                (key, _plain(value), key in known and _plain(value) != _plain(known[key]))
                for key, value in values.items()
            ],
        )
        for section, values, known in sections
    ]


def config_differences(runs: Sequence[Run]) -> list[list[str]]:
    """The config keys in which runs differ: ``[["echo.enabled", value of each run ...], ...]``."""
    flat = [{key: value for key, value, _ in _options(run.config)} for run in runs]
    keys = dict.fromkeys(key for values in flat for key in values)
    rows = [[key, *(values.get(key, "–") for values in flat)] for key in keys]
    return [row for row in rows if len(set(row[1:])) > 1]


def _options(config: dict[str, Any]) -> Iterator[tuple[str, str, bool]]:
    """The entries of :func:`config_table` with dotted keys."""
    for section, rows in config_table(config, top=""):
        for key, value, differs in rows:
            yield f"{section}.{key}" if section else key, value, differs


def _plain(value: Any) -> str:
    if isinstance(value, dict):
        value = [f"{key} {_plain(item)}" for key, item in value.items()]
    if isinstance(value, list | tuple):
        return ", ".join(map(_plain, value)) or "none"
    if isinstance(value, bool):
        return "yes" if value else "no"
    return "none" if value is None else str(value)
