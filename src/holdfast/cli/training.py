"""What `align` and `finetune` share: a method's flags, its trainer on its data, the model and its record."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from datasets import Dataset
from peft import PeftModel
from transformers import PreTrainedTokenizerBase
from trl import get_peft_config

from holdfast.checkpoint import PICKLE, replace_model, saved_aside
from holdfast.cli.arguments import ModelArguments, TrainingData
from holdfast.cli.boundary import building, working
from holdfast.cli.console import say
from holdfast.cli.effects import TRAINING, Effect
from holdfast.cli.parser import HoldfastParser
from holdfast.cli.runs import (
    AtBeginning,
    announce,
    discard_checkpoints,
    keep_apart,
    keep_models,
    last_log,
    model_keywords,
    output_dir,
    precision_record,
    refuse_changed_data,
    starting_checkpoint,
    train,
    warn_of_unseen_end,
)
from holdfast.config import DefenseConfig
from holdfast.data.harmful import load_harmful_rows
from holdfast.data.load import PROMPT_COLUMNS, TRAIN_COLUMNS, fingerprint, load_rows
from holdfast.data.refusals import named_file
from holdfast.data.sources import named
from holdfast.data.templates import adopt_chat_template
from holdfast.errors import InputError
from holdfast.files import digest, run_record, write_json
from holdfast.interruption import on_sigterm
from holdfast.models import base_names, load_model_and_tokenizer
from holdfast.trainer import DefenseTrainer

#: What a finished run has, beside the model; written last.
MARKER = "holdfast.json"
#: What a method may write beside the model, see `Method.report`.
REPORTS = VECTORS, WEIGHTS = "vectors.jsonl", "weights.jsonl"

_PERMISSIONS = ("overwrite_output_dir", "allow_changed_data")

Sets = dict[str, Dataset]
"""Data sets by the trainer's names for them (`train_dataset`, …)."""


@dataclass(frozen=True)
class Method:
    """One method of a training command.

    Attributes:
        data: its data flags.
        config: its configuration.
        trainer: its trainer, called with the model, the configuration and one data set per data flag.
        choose: changes the data sets before the trainer sees them: (sets, data flags, config, model, tokenizer) → sets.
        effects: when flags that are its own play a part.
        report: writes what the method found out beside the model: (trainer, folder) → the names of the files.
        presets: settings of it that come with the package, by name.
        needs: the flags that each of these does not do without.
    """

    data: type[TrainingData]
    config: type[DefenseConfig]
    trainer: type[DefenseTrainer]
    choose: Callable[[Sets, Any, DefenseConfig, Any, PreTrainedTokenizerBase], Sets] | None = None
    effects: Sequence[Effect] = ()
    report: Callable[[Any, Path], list[str]] | None = None
    presets: Mapping[str, Path] = field(default_factory=dict)
    needs: Mapping[str, Sequence[str]] = field(default_factory=dict)


def make_parser(stage: str, name: str, methods: Mapping[str, Method], description: str, *more: type) -> HoldfastParser:
    """Return the parser of a training command: model, data, the method's config, and what more there is to say."""
    method = methods[name]
    return HoldfastParser(
        (ModelArguments, method.data, method.config, *more),
        prog=f"holdfast {stage} {name}",
        description=description,
        effects=(*TRAINING, *method.effects),
        presets=method.presets,
        needs=method.needs,
        others={f"{stage} {other}": (one.data, one.config) for other, one in methods.items() if other != name},
    )


def run(command: str, verb: str, method: Method, parsed: tuple[Any, ...]) -> int:
    """Train a model; the finished one, with its tokenizer, lies in `--output_dir` itself.

    Args:
        command: The words of the command, for messages and records ("align patcher").
        verb: What it does to a model ("aligning").
        method: The method.
        parsed: What the parser of `make_parser` made of the words after the command.

    Returns:
        The exit code.

    Raises:
        InputError: The input cannot be used; nothing has been written.
        Stopped: SIGTERM came; a checkpoint is written, and nothing else.
        TrainingError: Training cannot go on; the last good checkpoint is kept.
    """
    model_args, data, config, *_ = parsed
    if config.eval_strategy != "no" and data.eval_data is None:
        raise InputError(f"--eval_strategy {config.eval_strategy.value} needs held-out rows: give --eval_data")
    source, folder = model_args.model_name_or_path, Path(config.output_dir)
    keep_apart(folder, folder, source)
    with output_dir(folder, marker=MARKER, overwrite=data.overwrite_output_dir):
        checkpoint = starting_checkpoint(folder, config.resume_from_checkpoint, overwrite=data.overwrite_output_dir)
        given = {name: value for name, value in asdict(data).items() if value is not None and name not in _PERMISSIONS}
        sources = {name: source for name, source in given.items() if name.endswith("_data")}
        taken: dict[str, Any] = {}
        sets, safe_rows = _load_sets(sources, taken)
        if getattr(config, "refusal", None) is not None:
            sources["refusal"] = config.refusal  # which may be in a file, too
        digests: dict[str, str | None] = {flag: fingerprint(records) for flag, records in taken.items()}
        if "refusal" in sources:
            digests["refusal"] = digest(file) if (file := named_file(sources["refusal"])) else None
        if checkpoint is not None and not data.allow_changed_data:
            refuse_changed_data(checkpoint, sources, digests, method=method.trainer.__name__)
        say(f"loading {source}")
        model, tokenizer = load_model_and_tokenizer(source, trainable=True, **model_keywords(model_args, config))
        for base in (*base_names(model), *filter(None, [getattr(config, "base", None)])):
            keep_apart(folder, folder, base)
        if checkpoint is None:
            keep_models(folder, overwrite=data.overwrite_output_dir)
        loaded = model.dtype
        adopt_chat_template(tokenizer, config.chat_template_path)
        with building(config):
            peft_config = get_peft_config(model_args)
        if peft_config is not None and isinstance(model, PeftModel):
            raise InputError(f"--use_peft: {source} is an adapter already, and it is this adapter that is trained")
        if method.choose is not None:
            sets = method.choose(sets, data, config, model, tokenizer)
        with building(config):
            trainer = method.trainer(
                model,
                config,
                processing_class=tokenizer,
                peft_config=peft_config,
                callbacks=[AtBeginning(partial(discard_checkpoints, folder))] if checkpoint is None else [],
                **sets,
            )
        warn_of_unseen_end(trainer)
        trainer.data_digests = digests

        name = command.split()[-1]
        say(f"{verb} {source} with {name} on {len(sets['train_dataset'])} rows of {named(data.train_data)}")
        started = time.monotonic()
        # A signal may also come while the finished model is written, which then is done.
        with on_sigterm(trainer.ask_to_stop), working(folder, config):
            train(trainer, title=command, folder=folder, checkpoint=checkpoint)
            is_first = trainer.is_world_process_zero()
            with saved_aside(folder, writes=is_first) as aside:
                trainer.save_model(str(aside), _internal_call=True)
                if is_first:
                    for name in (MARKER, *REPORTS):  # until the new model is whole, this is not a finished run
                        (folder / name).unlink(missing_ok=True)
                    replace_model(aside, folder)
            if config.push_to_hub:
                trainer.push_to_hub(commit_message="Model save")
            if is_first:
                (folder / PICKLE).unlink(missing_ok=True)
                record = {
                    **run_record(config, config.seed),
                    "command": command,
                    "model": source,
                    "data": given,
                    "taken": taken,
                    **safe_rows,
                    "precision": precision_record(loaded, config),
                    "resumed_from": checkpoint,
                    "seconds": round(time.monotonic() - started, 3),
                    "log": last_log(trainer.state.log_history),
                }
                reports = method.report(trainer, folder) if method.report is not None else []
                write_json(folder / MARKER, record)
                is_adapter = peft_config is not None or isinstance(model, PeftModel)
                announce(folder, "adapter_model.safetensors" if is_adapter else "model.safetensors", MARKER, *reports)
    return 0


def _load_sets(sources: Mapping[str, str], taken: dict[str, Any]) -> tuple[Sets, dict[str, int]]:
    """Read the data files, by the trainer's names for them (`train_data` → `train_dataset`).

    Notes, for the record, what was `taken`, and says how many rows of attack data were no attack.
    """
    sets, safe_rows = {}, {}
    for flag, source in sources.items():
        if flag == "attack_data":
            sets[f"{flag}set"], safe_rows["safe_rows_left_out"] = load_harmful_rows(
                source, flag=f"--{flag}", noted=taken
            )
        else:
            columns = PROMPT_COLUMNS if flag == "benign_data" else TRAIN_COLUMNS
            sets[f"{flag}set"] = load_rows(source, flag=f"--{flag}", columns=columns, noted=taken)
    return sets, safe_rows
