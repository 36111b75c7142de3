"""Model repositories of the Hugging Face Hub: the local copy of one, and a directory pushed to one.

``HF_TOKEN`` or `hf auth login` says who asks; ``HF_ENDPOINT`` names another hub.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from echorl_jax.errors import UserError, require_package
from echorl_jax.files import hub_answers, model_path, split_revision
from echorl_jax.models.config import ModelError

# What is downloaded of a repository.
PATTERNS = ["*.json", "*.safetensors", "*.txt", "*.jinja", "*.model"]
PACKAGE = "huggingface_hub", "huggingface_hub>=0.30"


def local_directory(path: str | Path) -> Path:
    """The directory of a model of the package, a local one, or the local copy of a repository.

    Args:
      path: of a directory, ``builtin:countdown``, ``OWNER/NAME`` or ``OWNER/NAME@REVISION``.

    Raises:
      ModelError: there is no such directory, and no repository that can be downloaded.
    """
    source = model_path(str(path))
    if Path(source).is_dir():
        return Path(source)
    name, revision = split_revision(source)
    try:
        hub = require_package(*PACKAGE, f"{path} is not a directory, and a repository")
        with _hub_errors(f"{path} is not a directory, and no repository could be downloaded"):
            options = {"allow_patterns": PATTERNS, "local_files_only": not hub_answers()}
            return Path(hub.snapshot_download(name, revision=revision, **options))
    except UserError as error:
        raise ModelError(str(error)) from None


def claim_repository(name: str) -> None:
    """Makes sure that ``push`` can write to a repository; creates a private one if there is none.

    Raises:
      UserError: the name is wrong, there is no token that may write, or no connection.
    """
    hub = require_package(*PACKAGE, f"pushing to {name}")
    with _hub_errors(f"{name} cannot be pushed to"):
        hub.create_repo(name, private=True, exist_ok=True)


def push(directory: Path, name: str, *, message: str) -> str:
    """Uploads a directory to a model repository as one commit; returns its address.

    Raises:
      UserError: it was not uploaded; the directory stays.
    """
    hub = require_package(*PACKAGE, f"pushing to {name}")
    with _hub_errors(f"{directory} could not be pushed to {name}"):
        commit = hub.upload_folder(repo_id=name, folder_path=directory, commit_message=message)
    return commit.repo_url


@contextmanager
def _hub_errors(what: str) -> Iterator[None]:
    import httpx  # that huggingface_hub stands on
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        yield
    except (
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
        httpx.HTTPError,
        OSError,
    ) as error:
        lines = str(error).strip().splitlines() or [type(error).__name__]
        raise UserError(f"{what}: {lines[0]}") from None
