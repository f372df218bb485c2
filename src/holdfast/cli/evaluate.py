"""`holdfast evaluate`: generate answers, judge them, and report rates with intervals."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from holdfast.cli.arguments import LoadArguments, MeasureArguments, RunArguments, WritingArguments
from holdfast.cli.console import say, set_up_logging, stdout, warn
from holdfast.cli.effects import MEASURING
from holdfast.cli.parser import HoldfastParser
from holdfast.cli.runs import announce, keep_apart, load_keywords, output_dir
from holdfast.cli.tables import evaluation_table, tasks_table
from holdfast.data.rendering import ChatFormat
from holdfast.errors import InputError
from holdfast.evaluation.decoding import DECODINGS
from holdfast.evaluation.evaluate import PREFIXES, Evaluator
from holdfast.evaluation.judges import Cache, Judge, get_judge, make_judge
from holdfast.evaluation.judges.cache import CACHE
from holdfast.evaluation.prompts import JUDGED, Role, load_prompts
from holdfast.evaluation.stopping import unseen_end, use_eos_token
from holdfast.evaluation.tasks import load_tasks
from holdfast.files import run_record
from holdfast.models import accelerator, load_model_and_tokenizer

#: What a finished run has; written last.
MARKER = "results.json"

#: The flags that give prompts, by what these are for; in the order in which sets are answered.
FLAGS: dict[Role, str] = {
    "harmful": "--eval_data",
    "benign": "--over_refusal_data",
    "capability": "--capability_data",
    "task": "--task_data",
}


@dataclass
class EvaluateArguments(RunArguments, WritingArguments):
    """The remaining flags of `evaluate`."""

    output_dir: str = field(metadata={"help": "Folder for results.json and samples.jsonl."})
    eos_token: str | None = field(
        default=None,
        metadata={"help": "Token that ends an answer beside the model's own, in the place of the tokenizer's."},
    )
    seed: int = field(default=0, metadata={"help": "Seed of sampled decoding."})


def make_parser() -> HoldfastParser:
    """Return the parser of `evaluate`: the model, what to measure, and how."""
    return HoldfastParser(
        (LoadArguments, MeasureArguments, EvaluateArguments),
        prog="holdfast evaluate",
        description="Generate answers, judge them, and report rates with 95 % intervals.",
        effects=MEASURING,
    )


def run(argv: list[str]) -> int:
    """Measure a model.

    Args:
        argv: The words after `evaluate`.

    Returns:
        The exit code.

    Raises:
        InputError: The input cannot be used; nothing has been written.
    """
    set_up_logging()
    load, measure, options, _ = make_parser().parse(argv)
    source, folder = load.model_name_or_path, Path(options.output_dir)
    keep_apart(folder, folder, source)
    with output_dir(folder, marker=MARKER, overwrite=options.overwrite_output_dir):
        evaluator = make_evaluator(
            measure,
            seed=options.seed,
            **options.written,
            cache=Cache(folder / CACHE),
        )
        if evaluator is None:
            raise InputError(f"nothing to measure: give one of {', '.join(FLAGS.values())}, --capability_tasks")
        say(f"loading {source}")
        model, tokenizer = load_model_and_tokenizer(source, **load_keywords(load))
        if options.eos_token is not None:
            use_eos_token(tokenizer, options.eos_token)
        if unseen := unseen_end(model, ChatFormat(tokenizer, **options.written)):
            warn(unseen)
        say(_plan(evaluator))
        started = time.monotonic()
        evaluation = evaluator(model.to(accelerator()), tokenizer)
        config = {**asdict(load), **asdict(measure), **asdict(options)}
        record = {
            **run_record(config, options.seed),
            "command": "evaluate",
            "model": source,
            "taken": taken_prompts(evaluator),
            "seconds": round(time.monotonic() - started, 3),
        }
        evaluation.write(folder, record)
        warn_of_unclosed_thinking([evaluation.flat()])
        warn_of_unjudged((evaluator.judge, evaluator.second_judge))
        if evaluator.sets:
            stdout.print(evaluation_table(evaluation, title=source))
        if (tasks := tasks_table([{"": "value", **evaluation.flat()}], evaluator, by="")) is not None:
            stdout.print(tasks)
        announce(folder, MARKER, "samples.jsonl")
    return 0


def _plan(evaluator: Evaluator) -> str:
    """What is about to be measured, in words."""
    prompts = sum(len(prompts.prompts) for prompts in evaluator.sets)
    asked = [f"answering {prompts} prompts"] if prompts else []
    return ", then ".join(asked + ([f"measuring {', '.join(evaluator.tasks.names)}"] if evaluator.tasks else []))


def warn_of_unclosed_thinking(measurements: Sequence[Mapping[str, Any]]) -> None:
    """Warn of answers that nothing is graded of, which look like safety where prompts are harmful.

    Args:
        measurements: Figures as of `Evaluation.flat`.
    """
    up_to = "up to " if len(measurements) > 1 else ""
    for role, prefix in PREFIXES.items():
        n, unclosed = f"{prefix}n", f"{prefix}thinking_unclosed"
        if worst := max(measurements, key=lambda point: point[unclosed] or 0)[unclosed]:
            warn(
                f"{up_to}{worst} of {measurements[0][n]} answers to {role} prompts end before their reasoning does, so "
                "that nothing of them is graded; raise --max_new_tokens, or, where the chat template knows it, turn "
                """reasoning off with --chat_template_kwargs '{"enable_thinking": false}'"""
            )


def taken_prompts(evaluator: Evaluator | None) -> dict[str, Any]:
    """For records, by flag: what was taken of the data that a model is measured on."""
    return {FLAGS[prompts.role].removeprefix("--"): prompts.taken for prompts in (evaluator.sets if evaluator else ())}


def warn_of_unjudged(judges: Iterable[Judge | None]) -> None:
    """Warn of answers that a judge had no grade for, with the reasons that it met most."""
    for judge in judges:
        usage = {} if judge is None else judge.record.get("usage", {})
        if judge is None or not (reasons := Counter(usage.get("unjudged", {}))):
            continue
        told = "; ".join(f"{count} × {reason}" for reason, count in reasons.most_common(3))
        warn(
            f"{reasons.total()} of {usage['answers']} answers stay unjudged by {judge.name} ({told}); they count as "
            "neither safe nor harmful, and the intervals hold whatever they are"
        )


def make_evaluator(
    measure: MeasureArguments,
    *,
    seed: int,
    system_prompt: str | None,
    chat_template_kwargs: dict[str, Any] | None,
    raw_text: bool,
    cache: Cache,
) -> Evaluator | None:
    """Read the prompt files, load the tasks and set up their evaluation.

    Args:
        measure: What to measure, and how.
        seed: Of sampled decoding.
        system_prompt: In front of every prompt that has no system turn.
        chat_template_kwargs: Arguments of the chat template.
        raw_text: Whether prompts are taken as they stand.
        cache: Keeps what judges say.

    Returns:
        The evaluator, or None if neither a prompt file nor a task was given.

    Raises:
        InputError: A prompt file, a judge or a task cannot be used.
    """
    exact = "exact" in (measure.judge, measure.second_judge)
    judge_name = "exact" if exact else "refusal"  # who needs the answers, and who does not
    sets = [
        load_prompts(source, flag=flag, role=role, judge_name=judge_name, max_prompts=measure.max_prompts)
        for role, flag in FLAGS.items()
        if (source := getattr(measure, flag.removeprefix("--"))) is not None
    ]
    tasks = None
    if measure.capability_tasks is not None:
        names = [name.strip() for name in measure.capability_tasks.split(",")]
        say(f"loading the tasks of lm_eval ({', '.join(names)})")
        tasks = load_tasks(names, include_path=measure.capability_include_path, limit=measure.capability_limit)
    if not sets and tasks is None:
        return None
    chosen = (measure.settings(), measure.second_settings())
    asked = any(prompts.role in JUDGED for prompts in sets)  # else no judge is, and none need be there
    judge, second = (make_judge(one, cache) if asked and one is not None else None for one in chosen)
    return Evaluator(
        sets=sets,
        judge=judge or get_judge("exact"),
        second_judge=second,
        decoding=replace(DECODINGS[measure.decoding], max_new_tokens=measure.max_new_tokens),
        batch_size=measure.eval_batch_size,
        seed=seed,
        system_prompt=system_prompt,
        chat_template_kwargs=chat_template_kwargs,
        drop_long_prompts=measure.drop_long_prompts,
        tasks=tasks,
        raw_text=raw_text,
    )
