"""Files on buckets: ``s3://``, ``gs://`` and what else fsspec knows.

Work happens in local files. A remote data file is downloaded once. A remote workdir has a local
folder, its mirror, that is downloaded at the start and uploaded at every checkpoint and at the end.
A manifest is uploaded last and lists the files that belong together, so that a kill during an
upload leaves the state before.
"""

import dataclasses
import hashlib
import json
import os
import re
import shutil
import tempfile
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from echorl_jax.errors import RunStopped, UserError, one_line, require_package
from echorl_jax.files import parse_object, sole_writer

REMOTE = re.compile(r"([a-z][a-z0-9+]*)://.+")
# The packages of the usual buckets, which fsspec imports.
PACKAGES = {"s3": "s3fs", "s3a": "s3fs", "gs": "gcsfs", "gcs": "gcsfs"}
MANIFEST = "manifest.json"
# Files of a folder that are for its machine alone, and writes in progress.
LOCAL = re.compile(r"(^|/)\.(lock|secret)$|\.partial(/|$)|orbax-checkpoint-tmp")
# Folders of a run that a report does not read.
UNREAD = ("checkpoints", "export", "compiled", "dumps", "profile", "wandb", "mlruns", "tensorboard")
# Seconds between uploads of a folder that has no checkpoints.
UPLOAD_EVERY_S = 60.0


def is_remote(path: str | Path) -> bool:
    """True for an address such as ``s3://bucket/folder``.

    >>> is_remote("gs://bucket/run"), is_remote("runs/first")
    (True, False)
    """
    return isinstance(path, str) and REMOTE.fullmatch(path) is not None


def filesystem(url: str) -> tuple[Any, str]:
    """The fsspec file system of an address, and the path in it.

    Raises:
      UserError: a package that it needs is missing, or there is no such kind of address.
    """
    scheme = url.partition("://")[0]
    if package := PACKAGES.get(scheme):
        require_package(package, package, url)
    fsspec = require_package("fsspec", "fsspec", url)
    with _errors(url, UserError):
        return fsspec.core.url_to_fs(url, use_listings_cache=False)


@contextmanager
def _errors(url: str, kind: type[Exception]) -> Iterator[None]:
    """Raises ``kind``, in one line, for whatever a bucket's client raises."""
    try:
        yield
    except (UserError, RunStopped):
        raise
    except Exception as error:  # each client has its own errors
        raise kind(f"{url}: {one_line(error)}") from error


def cache_folder() -> Path:
    """The folder that keeps remote files: ``ECHORL_CACHE``, or ``~/.cache/echorl``."""
    return Path(os.environ.get("ECHORL_CACHE") or "~/.cache/echorl").expanduser()


def find_files(url: str, suffixes: Sequence[str]) -> list[str]:
    """The addresses that a remote file, folder or pattern with ``*`` names, in order.

    Raises:
      UserError: there are none, or the bucket cannot be read.
    """
    fs, path = filesystem(url)
    with _errors(url, UserError):
        if "*" in path:
            found = fs.glob(path)
        else:
            found = [path] if fs.isfile(path) else fs.find(path)
        if found != [path]:
            found = [name for name in found if name.endswith(tuple(suffixes))]
    if not found:
        raise UserError(f"{url}: no such file")
    return [fs.unstrip_protocol(name) for name in sorted(found)]


def local_copy(url: str) -> Path:
    """A local copy of a remote file, which is downloaded again when the file has changed.

    Raises:
      UserError: it cannot be read.
    """
    fs, path = filesystem(url)
    with _errors(url, UserError):
        state = hashlib.sha256(f"{url} {fs.ukey(path)}".encode()).hexdigest()[:16]
        copy = cache_folder() / "files" / state / path.rpartition("/")[2]
        if not copy.exists():
            copy.parent.mkdir(parents=True, exist_ok=True)
            fresh = copy.with_name(f"{uuid.uuid4().hex}.partial")
            fs.get_file(path, str(fresh))
            fresh.replace(copy)
    return copy


def upload_file(file: Path, url: str) -> None:
    """Copies a local file to an address.

    Raises:
      UserError: it cannot be written.
    """
    fs, path = filesystem(url)
    with _errors(url, UserError):
        fs.put_file(str(file), path)


@dataclasses.dataclass
class Mirror:
    """A local folder and the remote one that it is uploaded to; a local path is its own mirror."""

    url: str
    directory: Path
    _writer: str = dataclasses.field(default_factory=lambda: uuid.uuid4().hex)
    _token: str = ""  # the writer of the manifest that was seen last
    _manifest: dict[str, int] = dataclasses.field(default_factory=dict)  # path -> bytes
    # Path -> (bytes, time of change) of each file when it was equal at both places.
    _equal: dict[str, tuple[int, int]] = dataclasses.field(default_factory=dict)
    _thread: threading.Thread | None = None
    _failure: Exception | None = None

    @property
    def remote(self) -> bool:
        """True if there is another place than the local one."""
        return is_remote(self.url)

    def download(self, wanted: Callable[[str], bool] = lambda name: True) -> None:
        """Fills the local folder with the files of the manifest that are wanted.

        A remote folder without a manifest is downloaded as it is.

        Raises:
          UserError: the bucket cannot be read.
        """
        fs, root = filesystem(self.url)
        with _errors(self.url, UserError):
            self._token, self._manifest = self._read_manifest(fs, root)
            names = list(self._manifest)
            if not self._token:
                start = len(root.rstrip("/")) + 1
                names = [path[start:] for path in fs.find(root)]
            names = [name for name in names if wanted(name)]
            _require_inside(names, self.url)
            copies = [self.directory / name for name in names]
            for folder in {copy.parent for copy in copies}:
                folder.mkdir(parents=True, exist_ok=True)
            if names:
                fs.get([f"{root}/{name}" for name in names], list(map(str, copies)))
        states = self._local_files()
        self._equal = {name: states[name] for name in names if name in states}

    def upload(self) -> None:
        """Uploads what has changed, then the manifest, and removes what is gone.

        Raises:
          RunStopped: the bucket cannot be written, or another run writes there.
        """
        if not self.remote:
            return
        fs, root = filesystem(self.url)
        now = self._local_files()
        changed = [name for name, state in now.items() if self._equal.get(name) != state]
        gone = [name for name in self._equal if name not in now]
        if not changed and not gone:
            return
        with _errors(self.url, RunStopped):
            token, _ = self._read_manifest(fs, root)
            if token != self._token:
                raise RunStopped(f"{self.url}: another run has written there; this one stops")
            sources = [str(self.directory / name) for name in changed]
            fs.put(sources, [f"{root}/{name}" for name in changed])
            self._manifest |= {name: now[name][0] for name in changed}
            for name in gone:
                self._manifest.pop(name, None)
            self._token = self._writer
            content = {"writer": self._token, "files": self._manifest}
            fs.pipe_file(f"{root}/{MANIFEST}", json.dumps(content).encode())
            if gone:
                fs.rm([f"{root}/{name}" for name in gone])
        self._equal = now

    def start_upload(self, busy: Callable[[], bool]) -> None:
        """Uploads in the background, once ``busy`` is false: a checkpoint is then complete."""
        if not self.remote:
            return
        self.wait()

        def work() -> None:
            while busy():
                time.sleep(0.05)
            self.upload()

        self._begin(work)

    def start_uploads(self, ended: threading.Event) -> None:
        """Uploads now and then in the background, until the end."""
        if not self.remote:
            return

        def work() -> None:
            while not ended.wait(UPLOAD_EVERY_S):
                self.upload()

        self._begin(work)

    def _begin(self, work: Callable[[], None]) -> None:
        def keep_error() -> None:
            try:
                work()
            except Exception as error:
                self._failure = error  # raised by wait()

        self._thread = threading.Thread(target=keep_error, name="upload", daemon=True)
        self._thread.start()

    def wait(self) -> None:
        """Waits for the upload in the background.

        Raises:
          RunStopped: it failed.
        """
        if self._thread:
            self._thread.join()
        self.raise_errors()

    def raise_errors(self) -> None:
        """Raises what an upload in the background has failed of, as soon as it is known."""
        if self._failure is not None:
            failure, self._failure = self._failure, None
            raise failure

    def _read_manifest(self, fs: Any, root: str) -> tuple[str, dict[str, int]]:
        try:
            content = parse_object(fs.cat_file(f"{root}/{MANIFEST}"))
        except FileNotFoundError:
            return "", {}
        return content["writer"], content["files"]

    def _local_files(self) -> dict[str, tuple[int, int]]:
        found = {}
        for folder, _, names in os.walk(self.directory):
            for name in names:
                path = Path(folder, name)
                relative = path.relative_to(self.directory).as_posix()
                if LOCAL.search(relative) or path.is_symlink():
                    continue
                with suppress(FileNotFoundError):  # replaced or deleted meanwhile
                    stat = path.stat()
                    found[relative] = stat.st_size, stat.st_mtime_ns
        return found


def _require_inside(names: Sequence[str], url: str) -> None:
    """Refuses names that would be written outside the local folder."""
    for name in names:
        if name.startswith("/") or ".." in name.split("/"):
            raise UserError(f"{url}: the name {name!r:.80} lies outside the folder")


def _folder_name(url: str) -> str:
    """The last part of an address, the name of its local folder.

    Raises:
      UserError: it names no folder.
    """
    name = url.rpartition("/")[2]
    if name in ("", ".", ".."):
        raise UserError(f"{url}: the last part of the address is no name of a folder")
    return name


@contextmanager
def mirrored(path: str | Path, *, periodic: bool = False) -> Iterator[Mirror]:
    """A local folder for a path; a remote one is downloaded first and uploaded at the end.

    Args:
      path: a local path stands for itself.
      periodic: whether to upload every minute too, where nobody calls ``start_upload``.

    Raises:
      UserError: the bucket cannot be read, or another process of this machine works there.
      RunStopped: it cannot be written.
    """
    if not is_remote(path):
        yield Mirror(str(path), Path(path))
        return
    url = str(path).rstrip("/")
    name = _folder_name(url)
    place = cache_folder() / "mirrors" / hashlib.sha256(url.encode()).hexdigest()[:16]
    filesystem(url)
    with sole_writer(place):
        mirror = Mirror(url, place / name)
        # What a killed process left may be older than the bucket, which is the truth.
        shutil.rmtree(mirror.directory, ignore_errors=True)
        mirror.directory.mkdir()
        mirror.download()
        ended = threading.Event()
        if periodic:
            mirror.start_uploads(ended)
        try:
            yield mirror
        except BaseException:
            ended.set()
            with suppress(RunStopped):  # the first error is the one to report
                mirror.wait()
                mirror.upload()
            raise
        ended.set()
        mirror.wait()
        mirror.upload()
        shutil.rmtree(mirror.directory)


@contextmanager
def local_run(path: str | Path) -> Iterator[Path]:
    """A run's local folder, or a copy of a remote one without what takes much space.

    Raises:
      UserError: the bucket cannot be read.
    """
    if not is_remote(path):
        yield Path(path)
        return
    url = str(path).rstrip("/")
    with tempfile.TemporaryDirectory() as folder:
        mirror = Mirror(url, Path(folder, _folder_name(url)))
        mirror.directory.mkdir()
        mirror.download(lambda name: name.partition("/")[0] not in UNREAD)
        yield mirror.directory
