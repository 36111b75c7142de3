"""The documentation as a site, built strictly: no dead link, no page outside the menu."""

import html
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from echorl_jax.config_file import describe_options

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("site")
    build = [sys.executable, "-m", "mkdocs", "build", "--strict", f"--site-dir={directory}"]
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(build, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-5000:]
    return directory


def text(site: Path, page: str) -> str:
    """The text of a page, without marks."""
    return html.unescape(re.sub(r"<[^>]+>", "", (site / page / "index.html").read_text()))


@pytest.mark.slow
def test_every_option_stands_on_the_page_of_options(site: Path) -> None:
    page = text(site, "options")
    missing = [key for key, _, _ in describe_options() if key not in page]
    assert not missing


@pytest.mark.slow
def test_the_api_has_shapes_and_its_doctests_as_code(site: Path) -> None:
    page = text(site, "api")
    assert 'token_entropy: Float[AnyArray, "N T"]' in page and ">>> step_ids(tokens" in page
    assert ":func:" not in page
    # A doctest outside a code block would be a quotation in a quotation.
    assert "<blockquote>" not in (site / "api" / "index.html").read_text()


@pytest.mark.slow
def test_links_into_the_repository_lead_to_copies(site: Path) -> None:
    assert "mine_echo_clips" in text(site, ".")
    copy = site / "repository" / "examples" / "custom_objective.py"
    assert copy.read_bytes() == (ROOT / "examples" / "custom_objective.py").read_bytes()
    assert 'href="repository/CONTRIBUTING.md.txt"' in (site / "index.html").read_text()
