"""Writing to what a user names: regular files whole or not at all, everything else as it is."""

from __future__ import annotations

import errno
import os
import stat
import sys
import tempfile
from pathlib import Path
from typing import TextIO

LARGEST_TEXT = 2**26
"""Bytes of a text that is read whole."""


def read_text(path: str | Path, limit: int = LARGEST_TEXT) -> str:
    """The text of a file in UTF-8.

    Raises:
        OSError: the file cannot be read.
        ValueError: it is not UTF-8, or longer than ``limit`` bytes.
    """
    with open(path, "rb") as file:
        data = file.read(limit + 1)
    if len(data) > limit:
        raise ValueError(f"more than {limit} bytes")
    return data.decode()


def write_atomically(path: str | Path, content: str | bytes) -> None:
    """Write ``content`` whole; on any failure a regular file is as it was.

    A regular file is replaced by a temporary one beside it, the target of a link too. A device, a pipe or a file of several
    names is written to, and "-" is the standard output.

    Raises:
        OSError: the folder is missing or not writable.
    """
    data = content.encode() if isinstance(content, str) else content
    stream = standard_stream(path)
    if stream is not None:
        stream.flush()
        stream.buffer.write(data)
        stream.buffer.flush()
    elif _replaceable(path):
        _replace(Path(os.path.realpath(path)), data)
    else:
        handle = os.open(path, os.O_WRONLY | os.O_TRUNC | os.O_NONBLOCK)  # a pipe that nobody reads would wait for ever
        os.set_blocking(handle, True)
        with open(handle, "wb") as file:
            file.write(data)


def require_writable(path: str | Path) -> None:
    """Raise OSError where ``write_atomically`` could not write; what is there stays as it is."""
    if standard_stream(path) is not None:
        return
    if _replaceable(path):
        handle, temporary = tempfile.mkstemp(dir=Path(os.path.realpath(path)).parent, prefix=".mla-spec.")
        os.close(handle)
        os.unlink(temporary)
    elif os.path.isdir(path):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
    elif not os.access(path, os.W_OK):  # nor opened: to who reads a pipe, closing it would be its end
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))


def standard_stream(path: str | Path) -> TextIO | None:
    """The standard output or error, where ``path`` is one: "-", or whatever else leads to the same file."""
    if str(path) == "-":
        return sys.stdout
    for stream in (sys.stdout, sys.stderr):
        try:
            if os.path.samestat(os.stat(path), os.fstat(stream.fileno())):
                return stream
        except (OSError, ValueError):
            continue  # no such file yet, or a stream that is none
    return None


def _replaceable(path: str | Path) -> bool:
    """Whether nothing is lost but the old content when the file is replaced."""
    try:
        found = os.stat(path)
    except FileNotFoundError:
        return True
    return stat.S_ISREG(found.st_mode) and found.st_nlink == 1


def _replace(path: Path, data: bytes) -> None:
    mode = stat.S_IMODE(path.stat().st_mode) if path.exists() else 0o666 & ~_umask()
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name[:100]}.")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, mode)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
