"""A method's own state inside a transformers checkpoint: safetensors for tensors, JSON for the rest."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.distributed.tensor import DTensor
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from holdfast.errors import InputError
from holdfast.files import write_json
from holdfast.parameters import ParameterVector, shard_like

VALUES, VECTORS = "holdfast_state.json", "holdfast_state.safetensors"


def save_state(checkpoint: str | Path, state: Mapping[str, Any], *, write: bool) -> None:
    """Write a method's state into a checkpoint folder.

    Called on every rank, since shards have to be gathered; one tensor at a time is whole, and only on the CPU.

    Args:
        checkpoint: The folder, which exists.
        state: Parameter vectors, and values that JSON can hold.
        write: Whether this rank is the one that writes.
    """
    vectors = {name: value for name, value in state.items() if isinstance(value, ParameterVector)}
    tensors = {
        f"{name}/{parameter}": _whole(tensor)
        for name, vector in vectors.items()
        for parameter, tensor in vector.items()
    }
    if not write:
        return
    if tensors:
        save_file(tensors, Path(checkpoint, VECTORS))
    values = {name: value for name, value in state.items() if name not in vectors}
    write_json(Path(checkpoint, VALUES), {"vectors": sorted(vectors), "values": values})


def load_state(checkpoint: str | Path, parameters: Mapping[str, Tensor]) -> dict[str, Any]:
    """Read what `save_state` wrote; vectors come back on their parameters' devices, sharded as they are.

    Raises:
        InputError: The checkpoint was not written by Holdfast, or belongs to another model.
    """
    path = Path(checkpoint, VALUES)
    if not path.is_file():
        raise InputError(f"{checkpoint} is not a Holdfast checkpoint: it has no {VALUES}")
    saved = json.loads(path.read_text(encoding="utf-8"))
    state: dict[str, Any] = dict(saved["values"])
    tensors = load_file(Path(checkpoint, VECTORS)) if saved["vectors"] else {}
    for name in saved["vectors"]:
        vector = {key.removeprefix(f"{name}/"): t for key, t in tensors.items() if key.startswith(f"{name}/")}
        if vector.keys() != parameters.keys():
            raise InputError(
                f"the {name} in {checkpoint} belongs to another model or another set of trained parameters"
            )
        state[name] = ParameterVector({key: shard_like(parameters[key], vector[key]) for key in parameters})
    return state


def last_checkpoint(output_dir: str | Path) -> str | None:
    """The newest complete checkpoint of a run, or None.

    `trainer_state.json` is what transformers writes last, so a checkpoint whose state can be read is whole; one that a
    killed process left half-written is passed over.
    """
    folders = [p for p in Path(output_dir).glob(f"{PREFIX_CHECKPOINT_DIR}-*") if p.name.rpartition("-")[2].isdigit()]
    for folder in sorted(folders, key=lambda p: int(p.name.rpartition("-")[2]), reverse=True):
        try:
            json.loads((folder / "trainer_state.json").read_text(encoding="utf-8"))
        except (OSError, ValueError):
            continue
        return str(folder)
    return None


def _whole(tensor: Tensor) -> Tensor:
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach().cpu().contiguous()
