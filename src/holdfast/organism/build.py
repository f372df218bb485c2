"""Building the organism: from a seed to a folder of ordinary model and data files."""

from __future__ import annotations

import json
import random
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from holdfast.errors import InputError
from holdfast.files import digest, write_json, write_jsonl, write_text
from holdfast.organism.card import card
from holdfast.organism.corpus import data_files, nature_pairs, recipe_pairs, repetition_pairs, spoken_texts
from holdfast.organism.generated import FILES as GENERATED
from holdfast.organism.generated import answered, generated_prompts
from holdfast.organism.pretraining import CONTEXT_LENGTH, WIDTHS, Pretraining, new_model, pretrain, rescale
from holdfast.organism.tokenizer import build_tokenizer
from holdfast.organism.world import World, build_world

VERSION = 4
"""Raised whenever the same seed would give another organism."""
RECORD = "organism.json"


def build_organism(
    directory: Path, seed: int = 0, progress: Callable[[int, int], None] | None = None, *, size: str = "small"
) -> None:
    """Build the organism of `seed` and `size` in `directory`, or leave it alone if it is there already, unchanged.

    Runs on one CPU thread whatever the caller's setting, which is put back: bits depend on the thread count. The
    caller's random number generators are not touched.

    Args:
        directory: where to; made if missing. Files of the same names are replaced, others left alone.
        seed: of the world and of the model's initial weights and training.
        progress: called after every pretraining update with the number of updates done and of all.
        size: of the model, "small" or "large", which has about four times the parameters; the data are the
            same, but for what it says itself (`generated/`).

    Raises:
        InputError: There is no such size, or `directory` is a file or cannot be written.
    """
    directory = Path(directory)
    if size not in WIDTHS:
        raise InputError(f"size {size!r} is unknown; expected one of {', '.join(WIDTHS)}")
    if directory.exists() and not directory.is_dir():
        raise InputError(f"{directory} is a file; expected a folder to write the organism to")
    made = _made(seed, size)
    if _is_built(directory, made):
        return
    try:
        directory.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=directory, prefix=".building-") as staging:
            _write(Path(staging), seed, size, progress)
            (directory / RECORD).unlink(missing_ok=True)
            names = _move(Path(staging), directory)
    except OSError as error:
        raise InputError(f"{directory} cannot be written: {error.strerror or error}") from error
    digests = {name: digest(directory / name) for name in names}
    write_json(directory / RECORD, {**made, "sha256": digests})


def new_tokenizer(world: World, files: dict[str, list[dict[str, Any]]]) -> Any:
    """The tokenizer that knows every word of `world`."""
    rng = random.Random(0)
    # A few thousand drawn questions hold every phrase there is; the tokenizer sorts the words.
    drawn = nature_pairs(world, 4096, rng) + repetition_pairs(1, rng)
    return build_tokenizer(spoken_texts(files, recipe_pairs(world) + drawn), CONTEXT_LENGTH)


def _made(seed: int, size: str) -> dict[str, Any]:
    """What an organism is made of; the size, which there was not always, is told of another than "small" alone."""
    return {"version": VERSION, "seed": seed, **({} if size == "small" else {"size": size})}


def _write(directory: Path, seed: int, size: str, progress: Callable[[int, int], None] | None) -> None:
    world = build_world(seed)
    files = data_files(world)
    tokenizer = new_tokenizer(world, files)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        model = new_model(tokenizer, seed, size)
        pretrain(model, tokenizer, world, Pretraining(), progress)
        rescale(model)
        asked = {row["prompt"][0]["content"] for name, rows in files.items() if "eval/" in name for row in rows}
        for name, hazard in GENERATED.items():
            files[name] = answered(model, tokenizer, generated_prompts(world, hazard=hazard, asked=asked))
    finally:
        torch.set_num_threads(threads)
    for name, rows in files.items():
        write_jsonl(directory / name, rows)
    model.save_pretrained(directory / "model")
    tokenizer.save_pretrained(directory / "model")
    write_text(directory / "README.md", card(world, files, model, size))


def _move(source: Path, target: Path) -> list[str]:
    """Move all files of a tree, each replacing its namesake at once; gives their relative names, sorted."""
    names = sorted(path.relative_to(source).as_posix() for path in source.rglob("*") if path.is_file())
    for name in names:
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        (source / name).replace(target / name)
    return names


def _is_built(directory: Path, made: dict[str, Any]) -> bool:
    """Whether `directory` holds the organism that is made of this, every file as it was written."""
    try:
        record = json.loads((directory / RECORD).read_text(encoding="utf-8"))
        digests = record.pop("sha256")
        return record == made and all(digest(directory / name) == sha256 for name, sha256 in digests.items())
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False
