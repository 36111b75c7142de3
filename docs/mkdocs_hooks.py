"""Hooks of MkDocs: pages made of files elsewhere in the repository, so that no text is there twice.

``index.md`` is README.md, ``options.md`` lists every key of config.py. Links to other files of the
repository lead to copies of them in the site.
"""

import re
from pathlib import Path
from typing import Any

import griffe
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

from echorl_jax.config_file import describe_options

ROOT = Path(__file__).parent.parent
DOCTEST = re.compile(r"^>>> .*(\n(?!\s*$).*)*", re.MULTILINE)
LINK = re.compile(r"\]\((?P<target>[^)#:]+)(?P<anchor>#[^)]*)?\)")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Adds the pages that are made, and the files of the repository that pages link to."""
    texts = [file.content_string for file in files.documentation_pages()]
    readme = (ROOT / "README.md").read_text()
    pages = {"index.md": readme, "options.md": _options(), "changelog.md": _text("CHANGELOG.md")}
    for name, text in pages.items():
        files.append(File.generated(config, name, content=text))
    linked = {_in_repository(m["target"]) for text in (*texts, readme) for m in LINK.finditer(text)}
    for name in sorted(filter(None, linked)):
        if (ROOT / name).is_file():
            content = (ROOT / name).read_bytes()
            files.append(File.generated(config, _copy(name), content=content))
    return files


def on_page_markdown(markdown: str, *, page: Any, **_: Any) -> str:
    """Turns the repository's links into the site's; a link to a folder keeps its text alone."""

    def moved(match: re.Match[str]) -> str:
        target, anchor = match["target"], match["anchor"] or ""
        if target.startswith("docs/"):
            return f"]({target.removeprefix('docs/')}{anchor})"
        name = _in_repository(target)
        if name is None or (name == target and page.file.src_uri != "index.md"):
            return match[0]
        return f"]({_copy(name)})" if (ROOT / name).is_file() else "]"

    return LINK.sub(moved, markdown)


class Docstrings(griffe.Extension):
    """Makes code blocks of doctests, and plain code of Sphinx's roles, in docstrings."""

    def on_instance(self, *, obj: griffe.Object, **_: Any) -> None:
        """Is called for every object whose docstring is read."""
        if obj.docstring:
            text = re.sub(r":\w+:`~?([^`]+)`", r"`\1`", obj.docstring.value)
            obj.docstring.value = DOCTEST.sub(r"```pycon\n\g<0>\n```", text)


def _copy(name: str) -> str:
    """The place of a file's copy; MkDocs would make pages of Markdown."""
    return f"repository/{name}.txt" if name.endswith(".md") else f"repository/{name}"


def _in_repository(target: str) -> str | None:
    """The path from the repository's root, of a link out of docs/ or of one in README.md."""
    name = target.removeprefix("../")
    return None if name.startswith("docs/") or not (ROOT / name).exists() else name


def _options() -> str:
    """Every key as a table, by section; the meaning is the comment above the field."""
    lines = [
        "# Options",
        "",
        "Set as `--config.KEY=VALUE`, or in a config file as `config.KEY`.",
        "",
    ]
    section = None
    for key, default, meaning in describe_options():
        head = key.rpartition(".")[0] or "top"
        if head != section:
            lines += ["", f"## {head}", "", "| key | default | meaning |", "| --- | --- | --- |"]
            section = head
        lines.append(f"| `{key}` | `{default}` | {_cell(meaning)} |")
    return "\n".join(lines) + "\n"


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("<", "&lt;")


def _text(name: str) -> str:
    return (ROOT / name).read_text()
