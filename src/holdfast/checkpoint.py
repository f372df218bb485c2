"""A method's own state inside a transformers checkpoint: safetensors for tensors, JSON for the rest."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from pickle import UnpicklingError  # what torch raises; nothing is unpickled here
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers.trainer import TRAINER_STATE_NAME, TRAINING_ARGS_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, sort_checkpoints

from holdfast.errors import InputError
from holdfast.files import flush, write_json
from holdfast.parameters import ParameterVector, gathered, shard_like

VALUES, VECTORS = "holdfast_state.json", "holdfast_state.safetensors"
#: What transformers saves beside a model; the run's record says the same in the open.
PICKLE = TRAINING_ARGS_NAME
_OF_A_MODEL = (
    *("config.json", "generation_config.json", "model*.safetensors", "model.safetensors.index.json"),
    *("adapter_config.json", "adapter_model.safetensors", "chat_template.jinja"),
)
#: The version of these two files. One that means something else by them has another.
FORMAT = 3


def save_state(
    checkpoint: str | Path,
    state: Mapping[str, Any],
    *,
    method: str,
    digests: Mapping[str, str | None],
    write: bool,
) -> None:
    """Write a method's state into a checkpoint folder.

    Called on every rank, since shards have to be gathered; one tensor at a time is whole, and only on the CPU;
    the rank that writes keeps them all there.

    Args:
        checkpoint: The folder, which exists.
        state: Parameter vectors, and values that JSON can hold.
        method: Whose state it is: the trainer's name.
        digests: What the run is trained on; see `read_digests`.
        write: Whether this rank is the one that writes.
    """
    vectors = {name: value for name, value in state.items() if isinstance(value, ParameterVector)}
    tensors = {}
    for name, vector in vectors.items():
        for parameter, tensor in vector.items():
            whole = _whole(tensor)
            if write:
                tensors[f"{name}/{parameter}"] = whole
    if not write:
        return
    if tensors:
        save_file(tensors, Path(checkpoint, VECTORS))
    values = {name: value for name, value in state.items() if name not in vectors}
    header = {"format": FORMAT, "method": method, "data": dict(digests)}
    write_json(Path(checkpoint, VALUES), {**header, "vectors": sorted(vectors), "values": values})


def load_state(checkpoint: str | Path, parameters: Mapping[str, Tensor], *, method: str) -> dict[str, Any]:
    """Read what `save_state` wrote; vectors come back on their parameters' devices, sharded as they are.

    Raises:
        InputError: The checkpoint was not written by this version of Holdfast, or belongs to another method or model.
    """
    saved = _read(checkpoint, method)
    state: dict[str, Any] = dict(saved["values"])
    for name in saved["vectors"]:
        with safe_open(Path(checkpoint, VECTORS), framework="pt") as file:  # one tensor at a time is whole
            known = {key.removeprefix(f"{name}/") for key in file.keys() if key.startswith(f"{name}/")}  # noqa: SIM118
            if known != parameters.keys():
                raise InputError(
                    f"the {name} in {checkpoint} belongs to another model or another set of trained parameters"
                )
            state[name] = ParameterVector(
                {key: shard_like(parameters[key], file.get_tensor(f"{name}/{key}")) for key in parameters}
            )
    return state


def read_digests(checkpoint: str | Path, *, method: str) -> dict[str, str | None]:
    """What a run was trained on: the SHA-256 of every data file, by its flag; None for what was no file.

    Raises:
        InputError: As for `load_state`.
    """
    with reading(checkpoint):
        return dict(_read(checkpoint, method)["data"])


def _read(checkpoint: str | Path, method: str) -> dict[str, Any]:
    path = Path(checkpoint, VALUES)
    if not path.is_file():
        raise InputError(f"{checkpoint} is not a Holdfast checkpoint: it has no {VALUES}")
    saved = dict(json.loads(path.read_text(encoding="utf-8")))
    if saved.get("format") != FORMAT:
        raise InputError(
            f"{checkpoint} was written by another version of Holdfast: its {VALUES} has format {saved.get('format')}, "
            f"expected {FORMAT}"
        )
    if saved["method"] != method:
        raise InputError(f"{checkpoint} was written by {saved['method']}, and {method} cannot go on from it")
    return saved


@contextmanager
def reading(checkpoint: str | Path) -> Iterator[None]:
    """Turn whatever the libraries say of a checkpoint that they cannot read into one sentence.

    They read pickles of tensors and numbers (`weights_only`), and nothing else in a pickle is carried out.

    Raises:
        InputError: A file is damaged, holds something other than what training writes, or belongs to another model.
    """
    try:
        yield
    except (InputError, torch.OutOfMemoryError):
        raise
    except UnpicklingError as error:
        raise InputError(
            f"{checkpoint} cannot be read: a pickle in it is damaged, or holds more than tensors and numbers"
        ) from error
    except (EOFError, KeyError, OSError, RuntimeError, SafetensorError, ValueError) as error:
        raise InputError(f"{checkpoint} cannot be read: {str(error).strip().partition(chr(10))[0]}") from error


def is_complete(checkpoint: str | Path) -> bool:
    """Whether a folder is a whole checkpoint: transformers writes its state last."""
    try:
        json.loads(Path(checkpoint, TRAINER_STATE_NAME).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return True


def last_checkpoint(output_dir: str | Path) -> str | None:
    """The newest complete checkpoint of a run, or None."""
    folders = [p for p in Path(output_dir).glob(f"{PREFIX_CHECKPOINT_DIR}-*") if p.name.rpartition("-")[2].isdigit()]
    folders.sort(key=lambda p: int(p.name.rpartition("-")[2]), reverse=True)
    return next((str(folder) for folder in folders if is_complete(folder)), None)


def kept(output_dir: str | Path) -> str:
    """What is left of a run that ended early, in words."""
    last = last_checkpoint(output_dir)
    return f"the last good checkpoint is {last}" if last else "no checkpoint had been written yet"


def unfinished_folder(output_dir: str | Path) -> Path:
    """Where a checkpoint lies before it is whole, and when it is being deleted."""
    return Path(output_dir, "_unfinished")


def discard_unfinished(output_dir: str | Path) -> None:
    """Remove what a killed run had not finished writing, or deleting."""
    shutil.rmtree(unfinished_folder(output_dir), ignore_errors=True)


def publish(checkpoint: Path, place: Path) -> None:
    """Flush a whole checkpoint to the disk and move it from the unfinished ones to its place.

    An older one of that name gives way. Should the process be killed in between, the name is missing, but not the
    checkpoint that the run went on from.
    """
    _flush_all(checkpoint)
    if place.exists():
        place.replace(checkpoint.with_name("replaced"))
    checkpoint.replace(place)
    flush(place.parent)
    discard_unfinished(place.parent)


@contextmanager
def saved_aside(output_dir: str | Path, *, writes: bool = True) -> Iterator[Path]:
    """Where a finished model is saved before it gets its place: on the same file system, and until it is whole.

    What is still there in the end is removed: on a full disk there is room again, and a model that lay in the place is
    as it was.

    Args:
        output_dir: The run's folder.
        writes: Whether this rank is the one that writes.
    """
    try:
        yield unfinished_folder(output_dir) / "model"
    finally:
        if writes:
            discard_unfinished(output_dir)


def replace_model(model: Path, folder: Path) -> None:
    """Flush a model that was saved aside to the disk, and put its files in the place of those of another model.

    Args:
        model: Where it was saved.
        folder: Where it is to lie. What else is there stays.
    """
    _flush_all(model)
    for path in [path for pattern in _OF_A_MODEL for path in folder.glob(pattern)]:
        path.unlink()  # of an adapter that lay here, say, for which the new model would be taken
    for path in model.iterdir():
        if (folder / path.name).is_dir():
            shutil.rmtree(folder / path.name)
        path.replace(folder / path.name)
    flush(folder)


def rotate(output_dir: str | Path, limit: int, best: str | None) -> None:
    """Keep so many checkpoints of a run, the newest ones, and the best whatever its age.

    The newest is always kept. `rotate_checkpoints` of transformers chooses alike, but deletes the rest where it lies.
    """
    checkpoints = sort_checkpoints(str(output_dir), use_mtime=True)
    spared = {checkpoints[-1], best} & set(checkpoints)
    others = [Path(checkpoint) for checkpoint in checkpoints if checkpoint not in spared]
    excess = len(checkpoints) - max(limit, len(spared))
    if excess > 0:
        discard(output_dir, others[:excess])


def discard(output_dir: str | Path, checkpoints: Iterable[Path]) -> None:
    """Remove checkpoints of a run, first all of each from its place, so that none is ever seen in part."""
    discard_unfinished(output_dir)
    unfinished_folder(output_dir).mkdir()
    for checkpoint in checkpoints:
        checkpoint.replace(unfinished_folder(output_dir) / checkpoint.name)
    discard_unfinished(output_dir)


def _flush_all(folder: Path) -> None:
    for path in [*folder.rglob("*"), folder]:
        flush(path)


def _whole(tensor: Tensor) -> Tensor:
    return gathered(tensor).detach().cpu().contiguous()
