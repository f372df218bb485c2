"""`holdfast stress`: find the cheapest way to break a model, and say what it takes beside an undefended twin."""

from __future__ import annotations

import datetime
import functools
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from holdfast.cli.arguments import LoadArguments, MeasureArguments, RunArguments, WritingArguments
from holdfast.cli.console import say, set_up_logging, stdout
from holdfast.cli.effects import STRESS
from holdfast.cli.evaluate import make_evaluator
from holdfast.cli.parser import HoldfastParser
from holdfast.cli.runs import announce, keep_apart, load_keywords, output_dir
from holdfast.cli.stress_report import Progress, cost_table
from holdfast.errors import InputError, Stopped
from holdfast.evaluation.evaluate import Evaluator
from holdfast.evaluation.judges.cache import CACHE, Cache
from holdfast.files import parse_json, read_text, run_record, write_json
from holdfast.interruption import on_sigterm
from holdfast.models import accelerator
from holdfast.report.facts import told_verdict
from holdfast.stress.answers import write_answers
from holdfast.stress.certificate import MARKER, SAMPLES, STARTED, TAX, TRIALS, assemble
from holdfast.stress.preparing import Prepared, differing, prepare
from holdfast.stress.schedule import Schedule
from holdfast.stress.search import tax_of, write_record
from holdfast.stress.studies import Studies
from holdfast.stress.subjects import Sources
from holdfast.stress.workers import run as run_workers

#: A certificate is good for a year: attacks get better.
_GOOD_FOR = datetime.timedelta(days=365)

#: What a search writes, beside what judges say.
_WRITTEN = (MARKER, STARTED, "study.db", TRIALS, SAMPLES, TAX)


@dataclass
class StressArguments(RunArguments, WritingArguments):
    """The remaining flags of `stress`. What is tried and how often is the suite's, and not to be tuned."""

    output_dir: str = field(metadata={"help": "Folder for the certificate, the record of every trial, and answers."})
    counterpart: str | None = field(
        default=None, metadata={"help": "The same base model, aligned on the same data without the defense."}
    )
    base: str | None = field(
        default=None, metadata={"help": "The public model that both were made of, where the attacker has it, too."}
    )
    attack_data: str | None = field(
        default=None, metadata={"help": "The attacker's harmful prompts with harmful answers."}
    )
    benign_data: str | None = field(
        default=None,
        metadata={"help": "The attacker's harmless prompts, with answers if there are any, of the same style."},
    )
    harmless_task_data: str | None = field(
        default=None,
        metadata={
            "help": "Rows of a harmless task that the models learn, to tell what the defense costs; --task_data tests "
            "it."
        },
    )
    suite: str = field(
        default="standard",
        metadata={
            "help": "How thorough the search is: quick, standard or full.",
            "choices": ["quick", "standard", "full"],
        },
    )
    leave_out: list[str] = field(
        default_factory=list, metadata={"help": "Attacks, or kinds of attackers, that are not tried."}
    )
    storage: str | None = field(
        default=None,
        metadata={
            "help": "Address of a database of Optuna's, such as postgresql://host/name, in which the same command on "
            "other machines joins the search (default: a file in --output_dir)."
        },
    )
    processes: int | None = field(
        default=None,
        metadata={"help": "Trials side by side, each with models of its own (default: 2, on an accelerator 1)."},
    )
    reported: str | None = field(
        default=None,
        metadata={"help": "JSON file with what the model's makers claim, to stand in the certificate apart from it."},
    )
    seed: int = field(default=0, metadata={"help": "Of all that is drawn."})

    def __post_init__(self) -> None:
        if self.processes is not None and self.processes < 1:
            raise InputError(f"--processes must be at least 1, not {self.processes}")


def make_parser() -> HoldfastParser:
    """Return the parser of `stress`: the models, the data, how to measure, and the suite."""
    return HoldfastParser(
        (LoadArguments, MeasureArguments, StressArguments),
        prog="holdfast stress",
        description="Find the cheapest way to break a model among all attacks, tuned, and certify what it takes. "
        "A search that was ended goes on with the same command.",
        effects=STRESS,
    )


def run(argv: list[str]) -> int:
    """Search for the cheapest way to break a model; certificate.json, trials/ and samples/ lie in `--output_dir`.

    Args:
        argv: The words after `stress`.

    Returns:
        The exit code.

    Raises:
        InputError: The input cannot be used; nothing has been written.
        Stopped: By SIGTERM; the same command goes on.
        TrainingError: A process of the search was killed.
    """
    set_up_logging()
    load, measure, options, _ = make_parser().parse(argv)
    for name in ("eval_data", "capability_data"):
        if getattr(measure, name) is None:
            raise InputError(f"--{name} is missing: an attack counts by the harm it does while capability is kept")
    if measure.capability_tasks is not None:
        raise InputError(
            "--capability_tasks: tasks take too long for the hundreds of trials of a search; measure them with "
            "holdfast attack, on the attacks that the certificate names"
        )
    if options.harmless_task_data is not None and measure.task_data is None:
        raise InputError("--harmless_task_data is what a task is learnt from; give --task_data, which tests it")
    reported = {} if options.reported is None else _reported(Path(options.reported))
    folder = Path(options.output_dir)
    for source in (load.model_name_or_path, options.counterpart, options.base):
        if source is not None:
            keep_apart(folder, folder, source)
    sources = Sources(
        model=load.model_name_or_path,
        counterpart=options.counterpart,
        base=options.base,
        attack_data=options.attack_data,
        benign_data=options.benign_data,
        harmless_task_data=options.harmless_task_data,
        evaluator=functools.partial(_evaluator, measure, options.seed, options.written, folder),
        load=load_keywords(load),
        written=options.written,
    )
    with output_dir(folder, marker=MARKER, overwrite=options.overwrite_output_dir):
        _require_own(folder, overwrite=options.overwrite_output_dir)
        say("loading the models, and measuring what they know")
        prepared = prepare(
            sources,
            suite=options.suite,
            seed=options.seed,
            leave_out=options.leave_out,
            folder=folder,
            storage=options.storage,
        )
        plan = prepared.plan
        if plan.storage is not None:
            plan.studies("")  # refuses one that cannot be used before anything is written
        given = {**asdict(load), **asdict(measure), **asdict(options)}
        processes = options.processes or (1 if accelerator().type != "cpu" else 2)
        told = {"config": run_record(given, options.seed)["config"], "reported": reported}
        inputs = _begin(folder, prepared, told, processes, overwrite=options.overwrite_output_dir)
        _search(prepared, processes, folder)
        found = plan.studies("").all_records()
        for record in found if plan.storage is not None else ():  # of trials that other machines ran
            write_record(folder, record)
        certificate = assemble(found, inputs, tax_of(plan, plan.taxed, say))
        write_answers(plan, found)
        write_json(folder / MARKER, certificate)
        stdout.print(cost_table(certificate), " ".join(told_verdict(certificate)), sep="\n", markup=False)
        announce(folder, MARKER, TRIALS, SAMPLES)
    return 0


def _reported(path: Path) -> dict[str, Any]:
    """What the model's makers claim."""
    text = read_text(path, named=f"--reported {path}")
    try:
        found = parse_json(text)
    except ValueError as error:
        raise InputError(f"--reported {path}: is not valid JSON ({error})") from error
    if not isinstance(found, dict):
        raise InputError(f"--reported {path}: expected a JSON object of claims, found a {type(found).__name__}")
    return found


def _evaluator(measure: MeasureArguments, seed: int, written: Mapping[str, Any], folder: Path) -> Evaluator:
    found = make_evaluator(measure, seed=seed, cache=Cache(folder / CACHE, shared=True), **written)
    assert found is not None  # as its sets were required
    return found


def _require_own(folder: Path, *, overwrite: bool) -> None:
    """Refuse a folder in which something lies where a search would write, and no search has put it there."""
    others = [name for name in _WRITTEN if (folder / name).exists()]
    if others and not overwrite and not (folder / STARTED).is_file():
        raise InputError(
            f"--output_dir {folder} holds {others[0]}, and no search was begun there, which {STARTED} would tell of; "
            "choose another folder or pass --overwrite_output_dir"
        )


def _begin(
    folder: Path, prepared: Prepared, told: Mapping[str, Any], processes: int, *, overwrite: bool
) -> dict[str, Any]:
    """Write down what is searched, or find it written down: then the search goes on."""
    path, identity = folder / STARTED, prepared.plan.identity
    if path.is_file() and not overwrite:
        found = _read(path)
        if found.get("identity") != identity:
            others = differing(found, prepared.inputs) if found else []
            raise InputError(
                f"--output_dir {folder} holds another search, {_told_apart(others)} ({STARTED}); choose another folder "
                "or pass --overwrite_output_dir"
            )
        if (folder / TRIALS).is_dir():
            say(f"going on with the search in {folder}")
        return found
    for name in _WRITTEN:  # of a search before
        place = folder / name
        shutil.rmtree(place) if place.is_dir() else place.unlink(missing_ok=True)
    today = datetime.datetime.now(datetime.UTC).date()
    inputs = {
        **prepared.inputs,
        **{"issued": str(today), "expires": str(today + _GOOD_FOR)},
        "measured_on": {"device": str(accelerator()), "date": str(today), "processes": processes},
        **told,
    }
    write_json(path, inputs)
    return inputs


def _told_apart(others: Sequence[str]) -> str:
    more = f" and {len(others) - 3} more" if len(others) > 3 else ""
    return f"with another {', '.join(others[:3])}{more}" if others else "which cannot be told any more"


def _read(path: Path) -> dict[str, Any]:
    try:
        found = parse_json(path.read_text(encoding="utf-8"))
    except ValueError:
        found = None
    return found if isinstance(found, dict) else {}


def _search(prepared: Prepared, processes: int, folder: Path) -> None:
    """Run the trials, and end in an orderly way where that is asked for."""
    asked_to_stop: list[bool] = []
    kept = f"what was tried is in {folder}, and the same command goes on from there"

    with Progress() as progress, on_sigterm(lambda: asked_to_stop.append(True)):

        def watch(studies: Studies[Schedule]) -> None:
            progress.show(studies)
            if asked_to_stop:
                raise Stopped(
                    f"asked to stop; what was tried is in {folder}, and the same command goes on from there",
                    str(folder),
                )

        try:
            run_workers(prepared.plan, processes=processes, watch=watch)
        except KeyboardInterrupt:
            raise KeyboardInterrupt(f"interrupted; {kept}") from None
