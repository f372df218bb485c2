"""`holdfast align sft|patcher`: align a model before its release."""

from __future__ import annotations

import time
from dataclasses import asdict
from pathlib import Path

from datasets import Dataset
from peft import PeftModel
from trl import get_peft_config

from holdfast.alignment.patcher import PatcherConfig, PatcherTrainer
from holdfast.cli.arguments import AlignData, ModelArguments, PatcherData
from holdfast.cli.console import say, set_up_logging
from holdfast.cli.parser import HoldfastParser
from holdfast.cli.runs import (
    announce,
    discard_checkpoints,
    keep_apart,
    last_log,
    model_keywords,
    output_dir,
    refusals,
    starting_checkpoint,
    train,
)
from holdfast.config import DefenseConfig
from holdfast.data.load import TRAIN_COLUMNS, load_rows
from holdfast.errors import InputError
from holdfast.files import run_record, write_json
from holdfast.models import load_model, load_tokenizer
from holdfast.trainer import DefenseTrainer

#: What a finished run has, beside the model; written last.
MARKER = "holdfast.json"

_METHODS: dict[str, tuple[type[AlignData], type[DefenseConfig], type[DefenseTrainer]]] = {
    "sft": (AlignData, DefenseConfig, DefenseTrainer),
    "patcher": (PatcherData, PatcherConfig, PatcherTrainer),
}


def make_parser(method: str) -> HoldfastParser:
    """Return the parser of `align METHOD`: model, data and the method's config."""
    data_type, config_type, _ = _METHODS[method]
    return HoldfastParser(
        (ModelArguments, data_type, config_type),
        prog=f"holdfast align {method}",
        description="Align a model; the finished model and its tokenizer lie in --output_dir.",
    )


def run(method: str, argv: list[str]) -> int:
    """Align a model; the finished one, with its tokenizer, lies in `--output_dir` itself.

    Args:
        method: "sft" or "patcher".
        argv: The words after the method.

    Returns:
        The exit code.

    Raises:
        InputError: The input cannot be used; nothing has been written.
        TrainingError: Training cannot go on; the last good checkpoint is kept.
    """
    set_up_logging()
    model_args, data, config, _ = make_parser(method).parse(argv)
    if config.eval_strategy != "no" and data.eval_data is None:
        raise InputError(f"--eval_strategy {config.eval_strategy.value} needs held-out rows: give --eval_data")
    source, folder = model_args.model_name_or_path, Path(config.output_dir)
    keep_apart(folder, folder, source)
    with output_dir(folder, marker=MARKER, overwrite=data.overwrite_output_dir):
        checkpoint = starting_checkpoint(folder, config.resume_from_checkpoint, overwrite=data.overwrite_output_dir)
        sources = {name: value for name, value in asdict(data).items() if name.endswith("_data") and value is not None}
        sets = _load_sets(sources)
        say(f"loading {source}")
        tokenizer = load_tokenizer(source)
        model = load_model(source, trainable=True, **model_keywords(model_args, config))
        peft_config = get_peft_config(model_args)
        if peft_config is not None and isinstance(model, PeftModel):
            raise InputError(f"--use_peft: {source} is an adapter already, and it is this adapter that is trained")
        trainer_type = _METHODS[method][2]
        with refusals():
            trainer = trainer_type(model, config, processing_class=tokenizer, peft_config=peft_config, **sets)
        if checkpoint is None and trainer.is_world_process_zero():
            discard_checkpoints(folder)

    say(f"aligning {source} with {method} on {len(sets['train_dataset'])} rows of {data.train_data}")
    started = time.monotonic()
    train(trainer, title=f"align {method}", folder=folder, checkpoint=checkpoint)
    (folder / MARKER).unlink(missing_ok=True)  # until the new model is whole, this is not a finished run
    trainer.save_model(str(folder))
    if trainer.is_world_process_zero():
        (folder / "training_args.bin").unlink(missing_ok=True)  # a pickle; the record says the same in the open
        record = {
            **run_record(config, config.seed),
            "command": f"align {method}",
            "model": source,
            "data": sources,
            "resumed_from": checkpoint,
            "seconds": round(time.monotonic() - started, 3),
            "log": last_log(trainer.state.log_history),
        }
        write_json(folder / MARKER, record)
        announce(folder, "model.safetensors" if peft_config is None else "adapter_model.safetensors", MARKER)
    return 0


def _load_sets(sources: dict[str, str]) -> dict[str, Dataset]:
    """Read the data files, by the trainer's names for them (`train_data` → `train_dataset`)."""
    return {
        f"{flag}set": load_rows(source, flag=f"--{flag}", columns=TRAIN_COLUMNS) for flag, source in sources.items()
    }
