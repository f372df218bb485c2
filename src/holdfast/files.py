"""Files as Holdfast writes them, whole or not at all and never over a finished run; and text files of the user's."""

import dataclasses
import errno
import hashlib
import importlib.metadata
import json
import logging
import math
import os
import platform
import socket
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from enum import Enum
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from holdfast import __version__
from holdfast.errors import InputError

logger = logging.getLogger(__name__)

# Uploads to the Hub leave out what begins so.
_LOCK = "_lock"
_RECORDED_PACKAGES = ("torch", "transformers", "trl", "peft", "datasets", "accelerate")


def read_text(path: Path | str, *, named: str | None = None, expected: str | None = None) -> str:
    """Read a text file of the user's: UTF-8, with a byte order mark or without, lines ended in any way.

    Args:
        path: The file.
        named: What errors call it, as `--flag FILE`; its path if not given.
        expected: What errors say was expected.

    Raises:
        InputError: It cannot be read, or is no such text.
    """
    named, wanted = named or str(path), "" if expected is None else f"; expected {expected}"
    try:
        return Path(path).read_text(encoding="utf-8-sig")
    except OSError as error:
        raise InputError(f"{named}: cannot be read ({error.strerror}){wanted}") from error
    except UnicodeDecodeError as error:
        raise InputError(f"{named}: is not UTF-8 text (byte {error.start}){wanted}") from error


def write_bytes(path: Path | str, content: bytes) -> None:
    """Write a file atomically.

    The content goes to a temporary file in the same folder, which then takes the place of `path`: a reader, or a run
    that is killed, sees the old file or the new one, never half of either. Missing parent folders are made.

    Args:
        path: The file to write.
        content: Its whole content.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as stream:
            stream.write(content)
            stream.flush()
            os.fsync(stream.fileno())
        temporary.replace(path)
    except BaseException as error:
        temporary.unlink(missing_ok=True)
        if isinstance(error, OSError) and error.filename is None:
            error.filename = str(path)  # a full disk does not say which file it has no room for
        raise


def write_text(path: Path | str, text: str) -> None:
    """Write a text file atomically, in UTF-8 and with the line ends that `text` has.

    Args:
        path: The file to write.
        text: Its whole content.
    """
    write_bytes(path, text.encode())


def write_json(path: Path | str, obj: Any) -> None:
    """Write one JSON document atomically, indented.

    Args:
        path: The file to write.
        obj: What to write.

    Raises:
        ValueError: If `obj` holds NaN or an infinity, which JSON does not know. Nothing is written then.
    """
    write_text(path, json.dumps(obj, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def write_jsonl(path: Path | str, rows: Iterable[Mapping[str, Any]]) -> None:
    """Write one JSON object per line, atomically.

    Args:
        path: The file to write.
        rows: The objects, in order.

    Raises:
        ValueError: If a row holds NaN or an infinity. Nothing is written then.
    """
    lines = [json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n" for row in rows]
    write_text(path, "".join(lines))


def parse_json(text: str) -> Any:
    """Read a JSON document as strictly as `write_json` writes one.

    Raises:
        ValueError: If it is none, holds NaN, an infinity or a number as large, or an object has a key twice, or it is
            nested too deeply.
    """
    try:
        return json.loads(
            text,
            parse_constant=_finite,
            parse_float=_finite,
            parse_int=_whole,
            object_pairs_hook=with_keys_once,
        )
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error


def _finite(number: str) -> float:
    if not math.isfinite(found := float(number)):
        raise ValueError(f"{number[:30]} is no number of JSON")
    return found


def _whole(number: str) -> int:
    _finite(number)
    return int(number)


def with_keys_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object of JSON, for `json.loads`, which by itself takes the last of several values.

    Raises:
        ValueError: If a key stands in it twice.
    """
    found = dict(pairs)
    if len(found) < len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for place, key in enumerate(keys) if key in keys[:place])
        raise ValueError(f"the key {twice!r} stands more than once")
    return found


def kind_of_value(value: Any) -> str:
    """What messages call a value of JSON, such as "an object"."""
    names = {dict: "an object", list: "a list", str: "text", bool: "a boolean", int: "a number", float: "a number"}
    return "null" if value is None else names.get(type(value), f"a {type(value).__name__}")


def append_jsonl(path: Path | str, rows: Iterable[Mapping[str, Any]]) -> None:
    """Add one JSON object per line to a file, and make it last: what was added before a run was killed is there.

    Args:
        path: The file, made where it is missing.
        rows: The objects, in order.

    Raises:
        OSError: If the disk is full, say. No part of a line is left then.
        ValueError: If a row holds NaN or an infinity. Nothing is added then.
    """
    lines = [json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n" for row in rows]
    with Path(path).open("ab", buffering=0) as stream:
        before = stream.seek(0, os.SEEK_END)
        content = "".join(lines).encode()
        try:
            while content:  # a full disk takes a part before it refuses
                content = content[stream.write(content) :]
            os.fsync(stream.fileno())
        except OSError:
            stream.truncate(before)
            raise


def whole_lines(path: Path | str, start: int = 0) -> list[bytes]:
    """Read the lines that `append_jsonl` added; half a line, as a killed run leaves it, is taken off the file.

    Args:
        path: The file.
        start: Where to begin, in bytes from its own beginning.

    Returns:
        The lines, as bytes: text would part at more than line ends. None where there is no file.
    """
    path = Path(path)
    if not path.exists():
        return []
    with path.open("rb") as stream:
        stream.seek(start)
        content = stream.read()
    end = content.rfind(b"\n") + 1
    if end < len(content):
        os.truncate(path, start + end)
    return content[:end].splitlines()


def flush(path: Path | str) -> None:
    """Make a file, or the names in a folder, last through a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def digest(path: Path | str) -> str:
    """Return the SHA-256 of a file's content, in hexadecimal."""
    with Path(path).open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def claim_output_dir(path: Path | str, *, finished_marker: str, overwrite: bool) -> Path:
    """Make sure that a run may write into a folder, before any work is done.

    Nothing in the folder is deleted: `overwrite` only permits the new run to replace the old one's files when it has
    results of its own.

    Args:
        path: The output folder; it is created if it does not exist.
        finished_marker: Name of the file that a finished run leaves in the folder.
        overwrite: Whether a finished run may be replaced.

    Returns:
        The folder.

    Raises:
        InputError: If the path is no folder, cannot be written, or holds a finished run and `overwrite` is false.
    """
    path = Path(path)
    if path.exists() and not path.is_dir():
        raise InputError(f"--output_dir {path} is a file, but a folder is expected")
    if (path / finished_marker).exists() and not overwrite:
        raise InputError(
            f"--output_dir {path} holds a finished run ({finished_marker}); "
            "choose another --output_dir or pass --overwrite_output_dir"
        )
    try:
        path.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path):
            pass
    except OSError as error:
        raise InputError(f"--output_dir {path} cannot be written ({error.strerror})") from error
    return path


@contextmanager
def alone_in(folder: Path, named: str) -> Iterator[None]:
    """Keep other runs out of a folder while this lasts.

    The lock is the operating system's and ends with this process, however that ends; its file is removed by an orderly
    end, and means nothing by itself. Of the ranks of a job the first one holds it for all.

    Args:
        folder: Where this run writes, and is about to: it has to be there.
        named: What to call it in the error.

    Raises:
        InputError: Another run is writing there.
    """
    if os.environ.get("RANK", "0") != "0":  # torchrun sets it
        yield
        return
    path = folder / _LOCK
    lock = FileLock(path, fallback_to_soft=False)
    try:
        lock.acquire(timeout=1)  # of one that is just ending, the file may still have to go
    except Timeout:
        raise InputError(f"{named} is being written to by another run{_holder(path)}; choose another folder") from None
    except OSError as error:
        if error.errno not in (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP):
            raise
        path.unlink(missing_ok=True)
        logger.warning("%s is on a file system without locks: see to it that no other run writes there", named)
    try:
        if lock.is_locked:
            path.write_text(f"{os.getpid()} {socket.gethostname()}", encoding="utf-8")
        yield
    finally:
        if lock.is_locked:
            path.unlink(missing_ok=True)  # held still: whoever has opened it by now finds it gone, and begins anew
            lock.release()


def _holder(path: Path) -> str:
    """Who holds a lock, as far as its file says."""
    try:
        process, host = path.read_text(encoding="utf-8").split()
    except (OSError, ValueError):
        return ""
    return f" (process {process}{'' if host == socket.gethostname() else f' on {host}'})"


def versions() -> dict[str, str]:
    """Return the versions that results depend on: Python, Holdfast and the libraries it stands on."""
    found = {"python": platform.python_version(), "holdfast": __version__}
    for package in _RECORDED_PACKAGES:
        found[package] = importlib.metadata.version(package)
    return found


def run_record(config: Any, seed: int | None) -> dict[str, Any]:
    """Describe a run, so that it can be run again.

    Args:
        config: The run's settings: a mapping or a dataclass instance. A config with its own `to_dict` (as those of
            transformers) is asked for it, since that leaves out access tokens.
        seed: The run's seed; None for a run in which nothing is drawn.

    Returns:
        A JSON-able dict with `holdfast`, `versions`, `seed` and `config`.
    """
    if hasattr(config, "to_dict"):
        settings = config.to_dict()
    elif dataclasses.is_dataclass(config) and not isinstance(config, type):
        settings = dataclasses.asdict(config)
    else:
        settings = dict(config)
    return {"holdfast": __version__, "versions": versions(), "seed": seed, "config": _jsonable(settings)}


def _jsonable(value: Any) -> Any:
    """Return `value` in JSON's own types; what JSON cannot say (paths, dtypes, NaN) becomes text."""
    if isinstance(value, Mapping):
        return {str(key): _jsonable(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_jsonable(item) for item in value]
    if isinstance(value, set | frozenset):
        return sorted((_jsonable(item) for item in value), key=str)
    if isinstance(value, Enum):
        return _jsonable(value.value)
    if isinstance(value, float):
        return value if math.isfinite(value) else str(value)
    return value if value is None or isinstance(value, bool | int | str) else str(value)
