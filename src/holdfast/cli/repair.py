"""`holdfast repair antidote`: repair a fine-tuned model that lost its safety."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from peft import PeftModel
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from holdfast.checkpoint import replace_model, saved_aside
from holdfast.cli.arguments import HARMFUL_HELP, LoadArguments, RunArguments, WritingArguments
from holdfast.cli.console import say, set_up_logging, steps_shown, warn
from holdfast.cli.parser import HoldfastParser
from holdfast.cli.runs import (
    announce,
    discard_checkpoints,
    keep_apart,
    keep_models,
    load_keywords,
    output_dir,
)
from holdfast.cli.training import MARKER, REPORTS
from holdfast.config import require_positive
from holdfast.data.formats import names_of
from holdfast.data.harmful import load_harmful_rows
from holdfast.data.limits import Limits
from holdfast.data.rendering import ChatFormat
from holdfast.data.sources import named
from holdfast.data.tokens import padded_batches, whole_rows
from holdfast.files import run_record, write_json
from holdfast.models import accelerator, base_names, from_flag, load_model, load_model_and_tokenizer
from holdfast.repair.antidote import check_ratio, prune_harmful


@dataclass
class RepairModel(LoadArguments):
    """The model of `repair`, which keeps its own type unless told otherwise."""

    dtype: str = field(
        default="auto",
        metadata={
            "help": "Type of the weights, also of those that are saved; `auto` is the model's own.",
            "choices": ["auto", "bfloat16", "float16", "float32"],
        },
    )


@dataclass
class AntidoteArguments(RunArguments, WritingArguments):
    """The remaining flags of `repair antidote`."""

    attack_data: str = field(
        metadata={"help": f"Harmful prompts with harmful answers; {HARMFUL_HELP} All other rows are used."}
    )
    output_dir: str = field(metadata={"help": "Folder for the repaired model, or adapter, and its tokenizer."})
    ratio: float | None = field(
        default=None,
        metadata={
            "help": "Share of every row of a weight to prune, rounded up to whole weights; if not given, 0.1 on an "
            "adapter and 1e-5, one weight a row, on a full model."
        },
    )
    targets: str | None = field(
        default=None,
        metadata={
            "help": "Regular expression that is searched for in the names of linear layers; if not given, an adapter's "
            "matrices, or a full model's query, key and value projections."
        },
    )
    aligned_model: str | None = field(
        default=None,
        metadata={
            "help": "The model, or the adapter, as it was before fine-tuning: pruned weights go back to its values "
            "instead of 0. Not part of the paper."
        },
    )
    batch_size: int = field(default=16, metadata={"help": "Rows that go through the model at a time."})
    max_length: int = field(default=1024, metadata={"help": "Longer rows are cut to so many tokens."})

    def __post_init__(self) -> None:
        require_positive(self, "batch_size", "max_length")


def make_parser(method: str) -> HoldfastParser:
    """Return the parser of `repair METHOD`: the model, and what the method needs."""
    return HoldfastParser(
        (RepairModel, AntidoteArguments),
        prog=f"holdfast repair {method}",
        description="Prune the weights that harmful data uses most; the repaired model lies in --output_dir.",
    )


def run(method: str, argv: list[str]) -> int:
    """Repair a model. The one on disk stays as it is; the repaired one, with its tokenizer, lies in `--output_dir`.

    Args:
        method: "antidote".
        argv: The words after the method.

    Returns:
        The exit code.

    Raises:
        InputError: The input cannot be used; nothing has been written.
    """
    set_up_logging()
    load, options, _ = make_parser(method).parse(argv)
    if options.ratio is not None:
        check_ratio(options.ratio)  # before anything is loaded
    source, folder = load.model_name_or_path, Path(options.output_dir)
    keep_apart(folder, folder, source)
    if options.aligned_model is not None:
        keep_apart(folder, folder, options.aligned_model)
    with output_dir(folder, marker=MARKER, overwrite=options.overwrite_output_dir):
        say(f"loading {source}")
        model, tokenizer = load_model_and_tokenizer(source, **load_keywords(load))
        limits = Limits.of(model)
        taken: dict[str, Any] = {}
        rows, safe_rows = _attack_rows(options, tokenizer, limits, taken)
        for base in base_names(model):
            keep_apart(folder, folder, base)
        keep_models(folder, overwrite=options.overwrite_output_dir)
        aligned = None
        if options.aligned_model is not None:
            say(f"loading {options.aligned_model}")
            with from_flag("--aligned_model"):
                aligned = load_model(options.aligned_model, dtype=load.dtype, base_model=load.base_model)
        say(f"repairing {source} with {method} on {len(rows)} rows of {named(options.attack_data)}")
        pad = limits.padding(tokenizer.pad_token_id, tokenizer.eos_token_id)
        started = time.monotonic()
        with steps_shown(f"repair {method}") as show:
            repair = prune_harmful(
                model.to(accelerator()),
                _batches(rows, options.batch_size, pad, show),
                ratio=options.ratio,
                targets=options.targets,
                aligned=aligned,
            )
        with saved_aside(folder) as aside:
            model.save_pretrained(aside)
            tokenizer.save_pretrained(aside)
            for name in (MARKER, *REPORTS):  # until the new model is whole, this is not a finished run
                (folder / name).unlink(missing_ok=True)
            replace_model(aside, folder)
        if options.overwrite_output_dir:
            discard_checkpoints(folder)
        is_adapter = isinstance(model, PeftModel)
        record = {
            **run_record({**asdict(load), **asdict(options)}, seed=None),
            "command": f"repair {method}",
            "model": source,
            "data": {"attack_data": options.attack_data},
            "taken": taken,
            "ratio": repair.ratio,
            "rows": len(rows),
            "safe_rows_left_out": safe_rows,
            "tokens": repair.tokens,
            "pruned": repair.total,
            "layers": {name: {"pruned": n, "weights": repair.weights[name]} for name, n in repair.pruned.items()},
            "seconds": round(time.monotonic() - started, 3),
        }
        write_json(folder / MARKER, record)
        done = "zeroed" if aligned is None else f"set back to {options.aligned_model}"
        weights = sum(repair.weights.values())
        say(f"{repair.total} of {weights} weights in {len(repair.pruned)} layers {done} (ratio {repair.ratio:g})")
        announce(folder, "adapter_model.safetensors" if is_adapter else "model.safetensors", MARKER)
    return 0


def _attack_rows(
    options: AntidoteArguments, tokenizer: PreTrainedTokenizerBase, limits: Limits, taken: dict[str, Any]
) -> tuple[list[list[int]], int]:
    """Read the harmful rows as token ids, cut to --max_length; and how many rows were safe by their own label.

    Notes what was `taken`.
    """
    dataset, safe_rows = load_harmful_rows(options.attack_data, flag="--attack_data", noted=taken)
    rows = whole_rows(dataset, ChatFormat(tokenizer, **options.written), name="attack")
    longer = sum(len(row) > options.max_length for row in rows)
    if longer:
        warn(f"{longer} of {len(rows)} rows of the attack data are cut to --max_length {options.max_length}")
    rows = [row[: options.max_length] for row in rows]
    for row, where in zip(rows, names_of(dataset, name="attack"), strict=True):
        limits.check_tokens(row, where)
        limits.check_length(len(row), where)
    return rows, safe_rows


def _batches(
    rows: list[list[int]], batch_size: int, pad: int, show: Callable[[int, int], None]
) -> Iterator[dict[str, Tensor]]:
    """Yield the batches, telling how many have gone through the model."""
    number = -(-len(rows) // batch_size)
    for done, batch in enumerate(padded_batches(rows, batch_size, pad), 1):
        yield batch
        show(done, number)
