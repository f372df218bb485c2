"""Rows of the Hub, or of a folder that lies as it would there, read by `datasets`."""

from __future__ import annotations

import ast
import re
from pathlib import Path
from typing import Any

from datasets import Dataset, DatasetBuilder, load_dataset_builder
from datasets.exceptions import DatasetGenerationError, DatasetNotFoundError
from datasets.utils.file_utils import cached_path

from holdfast.data.readers import is_data_file
from holdfast.data.sources import Part, existing
from holdfast.errors import InputError
from holdfast.hub import how_to_get_access, is_hub_id, reason, unreachable

_DEFAULT_SPLIT = "train"
_COMMIT = re.compile("[0-9a-f]{40}")


def read_dataset(part: Part, *, flag: str, otherwise: str) -> tuple[Dataset, dict[str, Any]]:
    """Read a split of a data set of the Hub, or of a folder that holds one.

    Args:
        part: What was asked for.
        flag: The flag that named it, for errors.
        otherwise: What to say of a name that is neither, beside that.

    Returns:
        The rows, as `datasets` keeps them on disk, and what was read for the record: configuration, split and, of the
        Hub, the commit.

    Raises:
        InputError: It is not there, cannot be reached or wants its terms accepted; it has several configurations or
            splits and none was named, or has not the one that was.
    """
    where = f"{flag} {part.label}"
    is_folder = existing(part.path, Path.is_dir) is not None
    if not is_folder:
        missing = f"{flag} {part.path} is neither a file nor a data set on the Hub"
        if is_data_file(part.path) or not is_hub_id(part.path):
            raise InputError(f"{missing}; no such file")
        if why := unreachable(part.path, "dataset", revision=part.revision):
            raise InputError(f"{missing} that can be read ({why}){otherwise}")
    elif part.revision is not None:
        raise InputError(f"{where}: a folder has no revision")
    path = str(Path(part.path).expanduser()) if is_folder else part.path
    try:
        builder = load_dataset_builder(path, part.name, revision=part.revision)
    except Exception as error:  # builders raise whatever the data make them raise
        raise InputError(f"{where} {_configuration(error, part) or _unreadable(error, part, is_folder)}") from error
    try:
        builder.download_and_prepare()
    except Exception as error:
        raise InputError(f"{where} {_unreadable(error, part, is_folder)}") from error
    split = part.split or _only_split(builder, where, part)
    try:
        rows = builder.as_dataset(split=split)
    except Exception as error:
        raise InputError(f"{where} has no split {split!r}; expected {_listed(list(builder.info.splits))}") from error
    if _COMMIT.fullmatch(part.revision or "") and builder.hash != part.revision:  # without the Hub, any that is cached
        raise InputError(f"{where} is cached at the commit {builder.hash}, not at {part.revision}")
    commit = builder.hash if not is_folder and _COMMIT.fullmatch(builder.hash or "") else None
    name = None if builder.config.name == "default" else builder.config.name
    found = {"name": name, "split": split, "revision": commit}
    return rows, {key: value for key, value in found.items() if value is not None}


def download(part: Part, *, flag: str) -> Path:
    """Fetch a file by its address, into the cache of `datasets`.

    Raises:
        InputError: It cannot be had, or is no file that can be read.
    """
    if not is_data_file(part.path):
        raise InputError(f"{flag} {part.path} is no address of a data file")
    try:
        return Path(cached_path(part.path))
    except Exception as error:
        raise InputError(f"{flag} {part.path} cannot be read ({reason(error)})") from error


def _only_split(builder: DatasetBuilder, where: str, part: Part) -> str:
    """The split that is read where none is named: `train`, or the only one."""
    splits = list(builder.info.splits)
    if _DEFAULT_SPLIT not in splits and len(splits) > 1:
        named = ":".join(filter(None, [part.path, part.name, splits[0]]))
        raise InputError(f"{where} needs a split: {_listed(splits)}, as in {named}")
    return _DEFAULT_SPLIT if _DEFAULT_SPLIT in splits else splits[0]


def _listed(names: list[str]) -> str:
    return " or ".join(filter(None, [", ".join(names[:-1]), names[-1]]))


def _configuration(error: Exception, part: Part) -> str | None:
    """What is wrong with the configuration that was named, or with naming none; None if that is not it."""
    found = re.search(r"(?:available configs|Available): (\[.*?\])", str(error))
    if found is None:
        return None
    names = [str(name) for name in ast.literal_eval(found[1])]
    has = _listed(names)
    if part.name is not None:
        return f"has no configuration {part.name!r}; expected {has}"
    if part.split in names:
        return f"names a configuration, and no split; expected {part.path}:{part.split}:SPLIT"
    return f"needs a configuration: {has}, as in {part.path}:{names[0]}:{part.split or 'SPLIT'}"


def _unreadable(error: Exception, part: Part, is_folder: bool) -> str:
    if isinstance(error, DatasetNotFoundError) and "gated" in str(error):
        why = how_to_get_access(part.path, "dataset")
    elif isinstance(error, DatasetGenerationError):  # which says that there is a cause
        why = " ".join(str(error.__cause__ or error).split())[:300]
    else:
        why = reason(error)
    return f"cannot be read {'by datasets' if is_folder else 'from the Hub'} ({why})"
