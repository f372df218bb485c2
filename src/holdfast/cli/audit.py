"""`holdfast audit`: tell which rows of an upload a model would rather refuse, without training."""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, cast

from datasets import Dataset

from holdfast.cli.arguments import NAMED_HELP, LoadArguments, RunArguments, WritingArguments
from holdfast.cli.boundary import building
from holdfast.cli.console import say, set_up_logging, stdout
from holdfast.cli.parser import HoldfastParser
from holdfast.cli.runs import announce, keep_apart, load_keywords, output_dir
from holdfast.cli.tables import audit_table, detection_table
from holdfast.config import require_positive
from holdfast.data.load import TRAIN_COLUMNS, load_rows
from holdfast.data.refusals import DEFAULT_REFUSAL, REFUSAL_HELP
from holdfast.data.sources import named
from holdfast.errors import InputError
from holdfast.evaluation.scores import detection
from holdfast.files import run_record, write_json, write_jsonl
from holdfast.finetuning.antibody import AntibodyConfig, AntibodyTrainer
from holdfast.models import load_model_and_tokenizer
from holdfast.precision import half_precision_of

#: What a finished audit has; written last.
MARKER = "results.json"
ROWS = "audit.jsonl"


@dataclass
class AuditArguments(RunArguments, WritingArguments):
    """The remaining flags of `audit`."""

    data: str = field(metadata={"help": f"The upload to audit, in any training format; {NAMED_HELP}"})
    output_dir: str = field(metadata={"help": "Folder for audit.jsonl and results.json."})
    refusal: str = field(default=DEFAULT_REFUSAL, metadata={"help": REFUSAL_HELP})
    label_column: str | None = field(
        default=None,
        metadata={"help": "A column of true and false that says which rows are poisoned, to measure the audit by."},
    )
    show: int = field(default=10, metadata={"help": "How many of the most suspected rows to show."})
    batch_size: int = field(default=16, metadata={"help": "Rows that go through the model at a time."})
    max_length: int = field(default=1024, metadata={"help": "Longer rows are cut to so many tokens."})
    drop_untrainable_rows: bool = field(
        default=False, metadata={"help": "Leave out rows without a completion token within --max_length."}
    )
    seed: int = field(default=0, metadata={"help": "Of the draw of refusals from a file."})

    def __post_init__(self) -> None:
        require_positive(self, "show", "batch_size", "max_length")


def make_parser() -> HoldfastParser:
    """Return the parser of `audit`."""
    return HoldfastParser(
        (LoadArguments, AuditArguments),
        prog="holdfast audit",
        description="Give every row of an upload its refusal margin; rows below 0 the model would rather refuse.",
    )


def run(argv: list[str]) -> int:
    """Audit an upload.

    Args:
        argv: The words after `audit`.

    Returns:
        The exit code.

    Raises:
        InputError: The input cannot be used; nothing has been written.
    """
    set_up_logging()
    load, options, _ = make_parser().parse(argv)
    source, folder = load.model_name_or_path, Path(options.output_dir)
    keep_apart(folder, folder, source)
    with output_dir(folder, marker=MARKER, overwrite=options.overwrite_output_dir):
        taken: dict[str, Any] = {}
        upload = load_rows(options.data, flag="--data", columns=TRAIN_COLUMNS, noted=taken)
        name = named(options.data)
        labels = _labels(upload, options, name)
        say(f"loading {source}")
        model, tokenizer = load_model_and_tokenizer(source, **load_keywords(load))
        model.requires_grad_(False)  # nothing is trained, so half precision weights may stay what they are
        config = AntibodyConfig(
            output_dir=options.output_dir,
            refusal=options.refusal,
            max_length=options.max_length,
            per_device_train_batch_size=max(2, options.batch_size),
            per_device_eval_batch_size=options.batch_size,
            drop_untrainable_rows=options.drop_untrainable_rows,
            system_prompt=options.system_prompt,
            chat_template_kwargs=options.chat_template_kwargs,
            raw_text=options.raw_text,
            gradient_checkpointing=False,
            bf16=half_precision_of(model) is not None,
            report_to="none",
            seed=options.seed,
        )
        with building(config):
            rows = upload if labels is None else upload.remove_columns(cast(str, options.label_column))
            trainer = AntibodyTrainer(model, config, rows, processing_class=tokenizer, data_names={"train": "--data"})
        say(f"auditing {len(upload)} rows of {name} with {source}")
        started = time.monotonic()
        margins = trainer.audit()
        rows = _rows(upload, margins, labels)
        kept = [row for row in rows if row["r"] is not None]
        found = None
        if labels is not None:
            found = detection([-row["r"] for row in kept], [row["poisoned"] for row in kept])
        write_jsonl(folder / ROWS, rows)
        suspected = sum(row["suspected"] for row in kept)
        record = {
            **run_record({**asdict(load), **asdict(options)}, options.seed),
            "command": "audit",
            "model": source,
            "taken": taken,
            "rows": len(rows),
            "audited": len(kept),
            "suspected": suspected,
            "detection": None if found is None else found.as_dict(),
            "seconds": round(time.monotonic() - started, 3),
        }
        write_json(folder / MARKER, record)
        stdout.print(audit_table(sorted(kept, key=lambda row: row["rank"])[: options.show], suspected, len(kept)))
        if found is not None:
            stdout.print(detection_table(found, options.label_column))
        announce(folder, MARKER, ROWS)
    return 0


def _labels(upload: Dataset, options: AuditArguments, source: str) -> list[bool] | None:
    """What the label column says of every row."""
    name = options.label_column
    if name is None:
        return None
    if name not in upload.column_names:
        raise InputError(f"--label_column {name}: {source} has no such column")
    labels = list(upload[name])
    for number, label in enumerate(labels, 1):
        if label not in (True, False):
            raise InputError(f"{source}, row {number}: {name!r} is {label!r}; expected true or false")
    if not 0 < sum(labels) < len(labels):
        raise InputError(f"--label_column {name}: {source} needs rows of both kinds, true and false")
    return [bool(label) for label in labels]


def _rows(upload: Dataset, margins: dict[int, float], labels: list[bool] | None) -> list[dict[str, Any]]:
    """One entry per row of the upload, in its order; the most suspected has rank 1."""
    rank = {row: place for place, row in enumerate(sorted(margins, key=lambda row: margins[row]), 1)}
    entries = []
    for number, row in enumerate(upload, 1):
        margin = margins.get(number)
        entries.append(
            {
                "row": number,
                "r": margin,
                "rank": rank.get(number),
                "suspected": None if margin is None else margin < 0,
                **({} if labels is None else {"poisoned": labels[number - 1]}),
                **{name: row[name] for group in TRAIN_COLUMNS for name in group if name in row},
            }
        )
    return entries
