"""`holdfast attack METHOD`: fine-tune a model the way an adversary would, and measure it along the way.

`full` and `lora` are here; attacks that train no weight are in `holdfast.cli.suite`.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

from datasets import Dataset
from peft import PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from trl import get_peft_config

from holdfast.attacks.attack import Attacker, Prompting
from holdfast.attacks.demonstrations import Demonstrations
from holdfast.attacks.prefill import Prefill
from holdfast.attacks.raw import Raw
from holdfast.attacks.real import AttackConfig, AttackTrainer
from holdfast.attacks.rows import RowVariant, mixed, sources_of
from holdfast.checkpoint import PICKLE, discard, publish, saved_aside
from holdfast.cli import suite
from holdfast.cli.arguments import AskingArguments, AttackData, MeasureAlongArguments, ModelArguments
from holdfast.cli.boundary import building
from holdfast.cli.console import say, set_up_logging, stdout, warn
from holdfast.cli.effects import ATTACKS
from holdfast.cli.evaluate import (
    MARKER,
    make_evaluator,
    taken_prompts,
    warn_of_unclosed_thinking,
    warn_of_unjudged,
)
from holdfast.cli.parser import HoldfastParser
from holdfast.cli.runs import (
    AtBeginning,
    announce,
    keep_apart,
    last_log,
    model_keywords,
    output_dir,
    precision_record,
    train,
    warn_of_unseen_end,
)
from holdfast.cli.tables import attack_tables, judge_records
from holdfast.data.formats import ORIGIN, is_tokenised, reader
from holdfast.data.harmful import load_harmful_rows
from holdfast.data.load import TRAIN_COLUMNS, load_rows
from holdfast.data.mix import overlap
from holdfast.data.rendering import ChatFormat
from holdfast.data.sources import named
from holdfast.data.templates import adopt_chat_template
from holdfast.errors import InputError, TrainingError
from holdfast.evaluation.asking import PLAINLY, Asking
from holdfast.evaluation.evaluate import SCHEMA, Evaluation, Evaluator
from holdfast.evaluation.judges.cache import CACHE, Cache
from holdfast.files import append_jsonl, run_record, write_json
from holdfast.interruption import on_sigterm
from holdfast.models import base_names, load_model_and_tokenizer, merge

#: What is added to as an attack is measured: its points, which in the end go into the record, and every answer.
POINTS, SAMPLES = "points.jsonl", "samples.jsonl"
#: Where the attacked model is saved.
ATTACKED = "model"


def make_parser(method: str) -> HoldfastParser:
    """Return the parser of `attack METHOD`: model, data, what to measure, and the attacker's config or knobs."""
    if method in suite.SUITE_ATTACKS:
        return suite.make_parser(method)
    return HoldfastParser(
        (ModelArguments, AttackData, RowVariant, AskingArguments, MeasureAlongArguments, AttackConfig),
        prog=f"holdfast attack {method}",
        description="Fine-tune a model on harmful data; results.json, samples.jsonl and model/ lie in --output_dir.",
        effects=ATTACKS[method],
    )


def run(method: str, argv: list[str]) -> int:
    """Attack a model. The model on disk stays as it is; the attacked one is saved beside the results.

    Measurements are written as they are made. A new attack does not go on from those that a killed one has left, and
    replaces them only when told to.

    Args:
        method: "full" or "lora"; or a name of `suite.SUITE_ATTACKS`.
        argv: The words after the method.

    Returns:
        The exit code.

    Raises:
        InputError: The input cannot be used; nothing has been written.
        TrainingError: The attack cannot go on.
    """
    if method in suite.SUITE_ATTACKS:
        return suite.run(method, argv)
    set_up_logging()
    model_args, data, variant, asking_args, measure, config, _ = make_parser(method).parse(argv)
    if method == "full" and model_args.use_peft:
        raise InputError("--use_peft: a full attack trains all parameters; for an adapter use holdfast attack lora")
    if config.resume_from_checkpoint:
        raise InputError("--resume_from_checkpoint: an attack is measured along the way and cannot be resumed")
    model_args.use_peft = method == "lora"
    source, folder = model_args.model_name_or_path, Path(config.output_dir)
    attacked = folder / ATTACKED
    keep_apart(folder, attacked, source)
    with output_dir(folder, marker=MARKER, overwrite=data.overwrite_output_dir):
        for name, what in ((POINTS, "the measurements"), (ATTACKED, "the model")):
            if (folder / name).exists() and not data.overwrite_output_dir:
                raise InputError(
                    f"--output_dir {folder} holds {what} of an attack that was not finished ({name}); "
                    "choose another --output_dir or pass --overwrite_output_dir"
                )
        evaluator = make_evaluator(
            measure,
            seed=config.seed,
            system_prompt=config.system_prompt,
            chat_template_kwargs=config.chat_template_kwargs,
            raw_text=config.raw_text,
            cache=Cache(folder / CACHE),
        )
        say(f"loading {source}")
        model, tokenizer = load_model_and_tokenizer(source, trainable=True, **model_keywords(model_args, config))
        for base in base_names(model):
            keep_apart(folder, attacked, base)
        loaded = model.dtype
        adopt_chat_template(tokenizer, config.chat_template_path)
        written = ChatFormat.of(tokenizer, config)
        taken = taken_prompts(evaluator)
        harmful, rows, safe_rows = _attack_rows(data, written, taken, seed=config.seed)
        measured_so = evaluator is not None and not variant.without_template
        asked_otherwise = written.require_alike(rows, name="attack") if measured_so else None
        overlapping = _overlap(rows, written, evaluator)
        asking = _asking(variant, asking_args, model, Attacker(written, harmful_rows=harmful, seed=config.seed))
        asked = None if evaluator is None or asking == PLAINLY else evaluator.asking_otherwise(asking)
        is_adapter = isinstance(model, PeftModel)

        def measured_at(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> Evaluation:
            assert evaluator is not None  # as it is what measures
            with_tasks = trainer.state.global_step in tasks_at or not evaluator.sets
            return (evaluator if with_tasks else replace(evaluator, tasks=None))(model, tokenizer)

        with building(config):
            trainer = AttackTrainer(
                model,
                config,
                variant.apply(rows, written),
                processing_class=tokenizer,
                evaluator=None if evaluator is None else measured_at,
                asked=asked,
                measured=_journal(folder),
                peft_config=get_peft_config(model_args),
                data_names={"train": sources_of(rows)},
                callbacks=[AtBeginning(partial(_clear, folder))],
            )
        tasks_at = _tasks_at(measure, config)
        trained_on = rows.filter(set(trainer.kept_rows["train"]).__contains__, input_columns=ORIGIN)
        poisoned = sum(trained_on["poisoned"])
        if any(rows["poisoned"]) and not poisoned:
            raise InputError(
                f"--attack_data {named(data.attack_data or '')}: no harmful row keeps a completion token, so "
                "--drop_untrainable_rows leaves no attack; raise --max_length"
            )
        for measuring in (evaluator, asked):
            if measuring is not None:
                measuring.check(trainer.model, tokenizer)
        warn_of_unseen_end(trainer)
        if overlapping:
            warn(f"{overlapping} evaluation prompts are among the attack's harmful rows, which inflates ASR")
        say(f"attacking {source} ({method}) on {len(trained_on)} rows, {poisoned} of them harmful")
        started = time.monotonic()
        try:
            with on_sigterm(_interrupt):
                train(trainer, title=f"attack {method}", folder=folder)
        except (KeyboardInterrupt, TrainingError) as error:
            kept = len(trainer.measurements)
            where = f"; {kept} measurements are in {folder / POINTS}" if kept else ""
            raise type(error)(f"{error}{where}") from None
        is_first = trainer.is_world_process_zero()
        with saved_aside(folder, writes=is_first) as aside:
            if is_adapter and method == "lora" and is_first:
                # The adapter that was attacked is merged into a base that lies nowhere on disk: save the whole model.
                merge(trainer.accelerator.unwrap_model(trainer.model)).save_pretrained(aside)
                tokenizer.save_pretrained(aside)
            elif not (is_adapter and method == "lora"):
                trainer.save_model(str(aside))
            if not is_first:
                return 0
            (aside / PICKLE).unlink(missing_ok=True)
            publish(aside, attacked)
        record = {
            "schema": SCHEMA,
            **run_record(config, config.seed),
            "command": f"attack {method}",
            "model": source,
            "attack": {
                "method": method,
                **{name: value for name, value in asdict(data).items() if name != "overwrite_output_dir"},
                **asdict(variant),
                "rows": len(trained_on),
                "harmful_rows": poisoned,
                "untrainable_rows_left_out": len(rows) - len(trained_on),
                "safe_rows_left_out": safe_rows,
                "overlapping_prompts": overlapping,
                "asked_otherwise": asked_otherwise,
                "lora": _lora(model_args) if method == "lora" else None,
            },
            "asking": asking.record() if asked is not None else None,
            "taken": taken,
            "evaluation": asdict(measure) if evaluator is not None else None,
            **judge_records(evaluator),
            "precision": precision_record(loaded, config),
            "weights_moved": trainer.weights_moved,
            "weights_moved_in_bf16": trainer.weights_moved_in_bf16,
            "seconds": round(time.monotonic() - started, 3),
            "log": last_log(trainer.state.log_history),
            "points": trainer.measurements,
        }
        write_json(folder / MARKER, record)
        (folder / POINTS).unlink(missing_ok=True)  # the record has them
        seen = trainer.weights_moved_in_bf16
        in_bf16 = "" if seen is None else f", {seen:.2%} as its passes in bf16 see them"
        say(f"the attack moved {trainer.weights_moved:.2%} of the weights that it trained{in_bf16}")
        if evaluator is not None:
            warn_of_unclosed_thinking(trainer.measurements)
            warn_of_unjudged((evaluator.judge, evaluator.second_judge))
            title = f"{source} under attack ({method})"
            for table in attack_tables(trainer.measurements, evaluator, title=title, asking=asking):
                stdout.print(table)
        announce(folder, MARKER, *([SAMPLES] if evaluator is not None else []), "model")
    return 0


def _clear(folder: Path) -> None:
    """Remove the results of a run before: none of them belongs to what comes now."""
    for name in (MARKER, POINTS, SAMPLES):  # the record first: without it no part of the rest is taken for a whole
        (folder / name).unlink(missing_ok=True)
    discard(folder, [*folder.glob("checkpoint-*"), *folder.glob(ATTACKED)])


def _tasks_at(measure: MeasureAlongArguments, config: AttackConfig) -> list[int]:
    """The steps at which tasks are measured, beside prompts."""
    chosen = measure.capability_tasks_at or [config.measure_at[0], config.measure_at[-1]]
    if beyond := sorted(set(chosen) - set(config.measure_at)):
        raise InputError(f"--capability_tasks_at {beyond[0]} is no step of --measure_at, which has {config.measure_at}")
    return chosen


def _interrupt() -> None:
    """What SIGTERM does to an attack, which has no checkpoint to go on from: the same as Ctrl-C."""
    raise KeyboardInterrupt


def _journal(folder: Path) -> Callable[[dict[str, Any], Evaluation], None]:
    """What writes every measurement down as it comes, so that an attack that is killed leaves those that it made."""

    def write(point: dict[str, Any], evaluation: Evaluation) -> None:
        told_by = {name: point[name] for name in ("steps", "asked_by")}
        append_jsonl(folder / SAMPLES, ({**told_by, **row} for row in evaluation.samples))
        append_jsonl(folder / POINTS, [point])

    return write


def _attack_rows(
    data: AttackData, written: ChatFormat, taken: dict[str, Any], *, seed: int
) -> tuple[Dataset | None, Dataset, int]:
    """Read the attack data, and what the attacker trains on: in one format, harmful rows marked in `poisoned`.

    Notes what was `taken`, and returns how many rows of the attack data were none, being safe by their own label.
    """
    harmful, benign, safe_rows = None, None, 0
    if data.attack_data is not None:
        harmful, safe_rows = load_harmful_rows(data.attack_data, flag="--attack_data", noted=taken)
    if data.benign_data is not None:
        benign = load_rows(data.benign_data, flag="--benign_data", columns=TRAIN_COLUMNS, noted=taken)
    for name, given in (("attack", harmful), ("benign", benign)):
        if given is not None:
            written.name_idle_columns(given, name=name)
    rows = mixed(harmful, benign, written, poison_ratio=data.poison_ratio, num_samples=data.num_samples, seed=seed)
    return harmful, rows, safe_rows


def _asking(variant: RowVariant, args: AskingArguments, model: PreTrainedModel, attacker: Attacker) -> Asking:
    """How the adversary asks: as the rows teach, and as the flags say."""
    promptings: list[Prompting] = []
    if args.shots is not None:
        promptings.append(Demonstrations(args.shots))
    if args.ask_raw:
        promptings.append(Raw())
    if args.opener is not None:
        promptings.append(Prefill(args.opener))
    asking = variant.asking
    for prompting in promptings:
        asking = asking.then(prompting.ask(model, attacker).asking)
    return asking


def _overlap(rows: Dataset, written: ChatFormat, evaluator: Evaluator | None) -> int:
    """Count the harmful evaluation prompts that the attacker trains on."""
    harmful = [prompts for prompts in (evaluator.sets if evaluator else []) if prompts.role == "harmful"]
    if not harmful or is_tokenised(rows, name="attack"):  # then there are no prompts left
        return 0
    read = reader(rows, name="attack", plain=written.plain)
    trained_on = [p for i, row in enumerate(rows) if row["poisoned"] for p in read(row, i)[1].prompts]
    return sum(overlap(trained_on, prompts.prompts) for prompts in harmful)


def _lora(model: ModelArguments) -> dict[str, Any]:
    return {name: value for name, value in asdict(model).items() if name.startswith("lora_")}
