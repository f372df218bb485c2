"""`holdfast judge SAMPLES`: judge saved answers again, by other judges."""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from holdfast.cli.arguments import RunArguments
from holdfast.cli.console import say, set_up_logging, stdout
from holdfast.cli.effects import JUDGING
from holdfast.cli.evaluate import MARKER, warn_of_unjudged
from holdfast.cli.judge_arguments import JudgeArguments
from holdfast.cli.parser import HoldfastParser
from holdfast.cli.runs import announce, output_dir
from holdfast.cli.tables import evaluation_table
from holdfast.errors import InputError
from holdfast.evaluation.evaluate import SCHEMA
from holdfast.evaluation.judges import Cache, make_judge
from holdfast.evaluation.judges.cache import CACHE
from holdfast.evaluation.judging import judge_record
from holdfast.evaluation.rejudging import judge_samples, measurement_of, read_samples
from holdfast.files import digest, run_record, write_json, write_jsonl


@dataclass
class SavedAnswers(RunArguments):
    """The remaining flags of `judge`."""

    output_dir: str = field(metadata={"help": "Folder for results.json, samples.jsonl and what the judges said."})


def make_parser() -> HoldfastParser:
    """Return the parser of `judge`: the answers and the judges."""
    parser = HoldfastParser(
        (JudgeArguments, SavedAnswers),
        prog="holdfast judge",
        description="Judge saved answers again. What a judge has said is kept in --output_dir as it comes: a run that "
        "was ended early goes on there.",
        positional="SAMPLES",
        effects=JUDGING,
    )
    parser.add_argument("samples", metavar="SAMPLES", help="The samples.jsonl of a run, or rows of prompt and answer.")
    return parser


def run(argv: list[str]) -> int:
    """Judge saved answers.

    Args:
        argv: The words after `judge`.

    Returns:
        The exit code.

    Raises:
        InputError: The input cannot be used; nothing has been written.
    """
    set_up_logging()
    judges, options, rest = make_parser().parse(argv)
    source, folder = Path(rest.samples), Path(options.output_dir)
    saved = read_samples(source, expected="exact" in (judges.judge, judges.second_judge))
    if (folder / "samples.jsonl").resolve() == source.resolve():
        raise InputError(f"--output_dir {folder}: {source} lies there, which would be replaced; choose another folder")
    with output_dir(folder, marker=MARKER, overwrite=options.overwrite_output_dir):
        cache = Cache(folder / CACHE)
        judge, other = make_judge(judges.settings(), cache), judges.second_settings()
        second = None if other is None else make_judge(other, cache)
        say(f"judging {len(saved)} answers")
        started = time.monotonic()
        evaluations = judge_samples(saved, str(source), judge, second)
        write_jsonl(folder / "samples.jsonl", [row for one in evaluations for row in one.samples])
        when = [measurement_of(one.samples[0]) for one in evaluations]
        points = [{**told, **one.flat()} for told, one in zip(when, evaluations, strict=True)]
        found: dict[str, Any] = {"points": points} if any(when) else {"results": evaluations[0].results}
        record = {
            "schema": SCHEMA,
            **run_record({**asdict(judges), **asdict(options)}, None),
            "command": "judge",
            "samples": {"path": str(source), "sha256": digest(source)},
            "judge": judge_record(judge),
            "second_judge": None if second is None else judge_record(second),
            "seconds": round(time.monotonic() - started, 3),
        }
        write_json(folder / MARKER, {**record, **found})
        warn_of_unjudged((judge, second))
        for told, one in zip(when, evaluations, strict=True):
            stdout.print(evaluation_table(one, title=" · ".join([str(source), *map(_named, told.items())])))
        announce(folder, MARKER, "samples.jsonl")
    return 0


def _named(when: tuple[str, Any]) -> str:
    return " ".join(map(str, when))
