"""The secret that all processes of a run share, so that no other process can join or end it.

It is ``ECHORL_SECRET`` where the launcher sets that, else the file ``.secret`` in the directory
that the run writes, which process 0 creates. It is never sent: each process signs a random
challenge.
"""

import dataclasses
import hmac
import secrets
from collections.abc import Mapping
from pathlib import Path

VARIABLE = "ECHORL_SECRET"
FILE = ".secret"


@dataclasses.dataclass(frozen=True)
class Secret:
    """Where a process finds the secret."""

    source: str  # the variable, or the path of the file
    value: bytes = b""  # of the variable

    @classmethod
    def find(cls, environment: Mapping[str, str], directory: Path) -> "Secret":
        """The variable's value, or the file in the directory that the run writes."""
        if value := environment.get(VARIABLE, ""):
            return cls(VARIABLE, value.encode())
        return cls(str(directory / FILE))

    def read(self) -> bytes:
        """The secret; empty while the file is not there."""
        try:
            return self.value or Path(self.source).read_bytes().strip()
        except FileNotFoundError:
            return b""

    def create(self) -> bytes:
        """The secret; a file that is not there is written, readable by this user alone."""
        if not self.read():
            path = Path(self.source)
            path.parent.mkdir(parents=True, exist_ok=True)
            fresh = path.with_name(f"{FILE}.partial")
            fresh.touch(mode=0o600)
            fresh.write_text(secrets.token_hex(16) + "\n")
            fresh.replace(path)
        return self.read()


def sign(secret: bytes, challenge: str) -> str:
    """Proves the knowledge of the secret without telling it."""
    return hmac.digest(secret, challenge.encode(), "sha256").hex()


def is_signed(secret: bytes, challenge: str, signature: object) -> bool:
    """Whether this is the signature of the challenge."""
    found = str(signature).encode(errors="replace")
    return hmac.compare_digest(sign(secret, challenge).encode(), found)
