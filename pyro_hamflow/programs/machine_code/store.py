"""Where compiled libraries are kept, from one process to the next.

A file is named by the key of what it was made from, and by the hash of its content: what was cut
short or changed is not loaded. It is written beside its place and renamed, so that processes that
make the same at the same time do not meet. Why something was declined is kept likewise.
"""

from __future__ import annotations

import hashlib
import os
import sys
import tempfile
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

_MOST_BYTES = 256 * 2**20  # of all files together, beyond which the oldest are removed
_DIGITS = 32  # of a hash, in a file's name
_ENVIRONMENT = "PYRO_HAMFLOW_CACHE"


class Store:
    """Files by their keys, in a folder.

    Arguments:
        folder: The folder; made when something is first kept.
        most_bytes: What all files together may take.

    Example:
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     store = Store(Path(folder))
        ...     store.keep("key", ".txt", b"content").read_bytes()
        b'content'
    """

    def __init__(self, folder: Path, most_bytes: int = _MOST_BYTES) -> None:
        self.folder = folder
        self.most_bytes = most_bytes

    def find(self, key: str, ending: str) -> Path | None:
        """The file of a key, if there is one whose content is what it was."""
        for path in self.folder.glob(f"{key}-*{ending}"):
            with suppress(OSError):
                if path.name == _name(key, path.read_bytes(), ending):
                    with suppress(OSError):  # where others may only read
                        os.utime(path)
                    return path
                path.unlink()
        return None

    def keep(self, key: str, ending: str, content: bytes) -> Path:
        """Writes a file.

        Raises:
            OSError: If the folder cannot be written to.
        """
        self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        path = self.folder / _name(key, content, ending)
        handle, beside = tempfile.mkstemp(dir=self.folder, prefix=".")
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(content)
            os.replace(beside, path)
        except BaseException:
            Path(beside).unlink(missing_ok=True)
            raise
        self._shrink(path)
        return path

    def clear(self) -> None:
        """Removes all files."""
        for path in list(self._files()):
            path.unlink(missing_ok=True)

    def _shrink(self, newest: Path) -> None:
        """Removes files until they are few enough, those first that were not used for longest."""
        with suppress(OSError):  # another process may remove them too
            known = [(path.stat().st_mtime, path.stat().st_size, path) for path in self._files()]
            total = sum(size for _, size, _ in known)
            for _, size, path in sorted(known):
                if total > self.most_bytes and path != newest:
                    path.unlink(missing_ok=True)
                    total -= size

    def _files(self) -> Iterator[Path]:
        return (path for path in self.folder.glob("*") if path.is_file())


def _name(key: str, content: bytes, ending: str) -> str:
    return f"{key}-{hashlib.sha256(content).hexdigest()[:_DIGITS]}{ending}"


def key_of(*parts: str) -> str:
    """A key of everything that something is made from."""
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:_DIGITS]


def user_store() -> Store:
    """The store in the user's cache folder, or where ``PYRO_HAMFLOW_CACHE`` names another."""
    named = os.environ.get(_ENVIRONMENT)
    if named:
        return Store(Path(named))
    if sys.platform == "darwin":
        return Store(Path.home() / "Library" / "Caches" / "pyro_hamflow")
    caches = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Store(Path(caches) / "pyro_hamflow")


def clear_cache() -> None:
    """Removes all compiled code that was kept on disk; what is in use stays in use."""
    user_store().clear()
