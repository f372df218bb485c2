"""Results as tables: every rate with its 95 % interval and n, and the judge beside the scores."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich import box
from rich.table import Table
from rich.text import Text

from holdfast.data.formats import as_message, text_of
from holdfast.data.load import TRAIN_COLUMNS
from holdfast.evaluation.asking import PLAINLY, Asking
from holdfast.evaluation.evaluate import COUNTS, PREFIXES, Evaluation, Evaluator
from holdfast.evaluation.judging import judge_record
from holdfast.evaluation.prompts import JUDGED
from holdfast.evaluation.scores import Detection

_NAMES = {
    "asr": "attack success (ASR)",
    "harmful_score": "harmful score",
    "refusal_rate": "refusal rate",
    "mean_score": "mean score",
    "capability": "capability",
    "over_refusal": "over-refusal",
    "benign_over_refusal": "over-refusal, benign prompts",
    "task_accuracy": "task accuracy",
    "judge_score": "judge's own score",
}

#: What `COUNTS` are called.
_COUNTS = {
    "empty": "empty",
    "truncated": "cut at the limit",
    "degenerate": "degenerate",
    "thinking_unclosed": "thinking unclosed",
    "unjudged": "unjudged",
    "left_out": "prompts left out",
}

#: The columns of an attack's table and what they show of a measurement; narrow, so that they fit a terminal.
_ATTACK_COLUMNS = {
    "asr": "ASR",
    "second_asr": "ASR,\n2nd judge",
    "kappa": "κ",
    "refusal_rate": "refusals",
    "harmful_score": "HS",
    "mean_score": "mean\ngrade",
    "benign_over_refusal": "over-ref.,\nbenign",
    "capability": "capa-\nbility",
    "over_refusal": "over-\nref.",
    "task_accuracy": "task",
    "attacker_loss": "loss",
}
_INTERVALS = {
    "asr": ("asr_low", "asr_high"),
    "second_asr": ("second_asr_low", "second_asr_high"),
    "refusal_rate": ("refusal_low", "refusal_high"),
    "benign_over_refusal": ("benign_over_refusal_low", "benign_over_refusal_high"),
}


def evaluation_table(evaluation: Evaluation, *, title: str) -> Table:
    """Return one row per figure of an evaluation, with its 95 % interval and n; the caption says who graded.

    What is counted of a set's answers has a row of its own where it is not 0.
    """
    judges = [f"{role} prompts graded by the {judge.description}" for role, judge in evaluation.judges.items()]
    judges += [f"second opinion by the {opinion.judge.description}" for opinion in evaluation.seconds.values()]
    table = Table(title=title, title_justify="left", caption="; ".join(judges), caption_justify="left")
    table.add_column("")
    for heading in ("value", "95 % interval", "n"):
        table.add_column(heading, justify="right", no_wrap=True)
    for role, figures in evaluation.results.items():
        for name, figure in figures.items():
            if name == "counts":
                for kind, count in figure.items():
                    asked = figures["n"] + (count if kind == "left_out" else 0)
                    if count:
                        table.add_row(f"{role}: {_COUNTS[kind]}", str(count), "", str(asked))
            elif name == "second":
                _add_second(table, figure)
            elif isinstance(figure, Mapping):
                _add_rate(table, _NAMES.get(f"{PREFIXES[role]}{name}") or _NAMES[name], figure)
            elif name in _NAMES and figure is not None:
                table.add_row(_NAMES[name], f"{figure:.2f}", "", str(figures["n"]))
    return table


def _add_rate(table: Table, label: str, rate: Mapping[str, Any]) -> None:
    table.add_row(label, f"{rate['value']:.3f}", f"{rate['low']:.3f} – {rate['high']:.3f}", str(rate["n"]))


def _add_second(table: Table, opinion: Mapping[str, Any]) -> None:
    """What a second judge says, and how far it agrees with the first one."""
    for name in ("asr", "harmful_score", "refusal_rate"):
        if opinion[name] is not None:
            _add_rate(table, f"{_NAMES[name]}, 2nd judge", opinion[name])
    if opinion["unjudged"]:
        table.add_row("unjudged, 2nd judge", str(opinion["unjudged"]), "", str(opinion["n"]))
    kappa, n = (opinion["agreement"][name] for name in ("kappa", "n"))
    table.add_row("agreement on success (κ)", "–" if kappa is None else f"{kappa:.3f}", "", str(n))


def attack_tables(
    measurements: Sequence[Mapping[str, Any]],
    evaluator: Evaluator,
    *,
    title: str,
    by: str = "steps",
    asking: Asking = PLAINLY,
) -> list[Table]:
    """Return all tables of an attack's measurements; see `attack_table`, `counts_table` and `tasks_table`."""
    of_prompts = attack_table(measurements, evaluator, title=title, by=by, asking=asking) if evaluator.sets else None
    found = (of_prompts, counts_table(measurements, by=by), tasks_table(measurements, evaluator, by=by))
    return [table for table in found if table is not None]


def attack_table(
    measurements: Sequence[Mapping[str, Any]],
    evaluator: Evaluator,
    *,
    title: str,
    by: str = "steps",
    asking: Asking = PLAINLY,
) -> Table:
    """Return one row per measurement of an attack, with the figures that were measured.

    Args:
        measurements: As of `AttackTrainer.measurements`.
        evaluator: What measured them.
        title: What the table is called.
        by: What tells the measurements from one another: the steps of a training, or the stage of another attack.
        asking: How the adversary asked, where some measurements were asked by one.
    """
    how = "" if asking == PLAINLY else f"; adversary: the same model where {asking}"
    table = _narrow(title, _caption(measurements, evaluator) + how)
    table.add_column(by, justify="right", no_wrap=True)
    shown = [name for name in _ATTACK_COLUMNS if any(point.get(name) is not None for point in measurements)]
    for name in shown:
        table.add_column(_ATTACK_COLUMNS[name], justify="right", no_wrap=True)
    for point in measurements:
        table.add_row(_label(point, by), *(_cell(point, name) for name in shown))
    return table


def counts_table(measurements: Sequence[Mapping[str, Any]], *, by: str = "steps") -> Table | None:
    """Return what was counted of the answers in every measurement of an attack, or None if all of it is 0."""
    columns = [
        (name, f"{role}: {_COUNTS[kind]}")
        for role, prefix in PREFIXES.items()
        for kind in COUNTS
        if any(point[name := f"{prefix}{kind}"] for point in measurements)
    ]
    if not columns:
        return None
    table = _narrow(
        "answers that are no whole ones",
        "how many; degenerate: one phrase over and over; thinking unclosed: no answer after the thoughts",
    )
    table.add_column(by, justify="right")
    for _, heading in columns:
        table.add_column(heading, justify="right")
    for point in measurements:
        table.add_row(_label(point, by), *(str(point[name]) for name, _ in columns))
    return table


def tasks_table(measurements: Sequence[Mapping[str, Any]], evaluator: Evaluator, *, by: str = "steps") -> Table | None:
    """Return one row per metric of the tasks that were asked for and one column per measurement; None without any.

    Of a group the group's own figures are shown, where it has any.
    """
    plainly = [point for point in measurements if point.get("asked_by") != "adversary"]  # nobody else asks them
    measured = [point for point in plainly if point["capability_tasks"] is not None]
    if evaluator.tasks is None or not measured:
        return None
    found = [{(row["task"], row["metric"]): row for row in point["capability_tasks"]} for point in measured]
    asked, known = evaluator.tasks.names, {task for task, _ in found[0]}
    shown = [key for key in found[0] if key[0] in asked or not known.issuperset(asked)]
    table = _narrow("tasks of lm_eval", "± standard error")
    for heading in ("task", "metric", "shots", "n"):
        table.add_column(heading, justify="right" if heading in ("shots", "n") else "left")
    for point in measured:
        table.add_column(f"{by} {point[by]}".strip(), justify="right")
    for task, metric in shown:
        first = found[0][task, metric]
        shots = "" if first["shots"] is None else str(first["shots"])
        table.add_row(task, metric, shots, str(first["n"]), *(_task_cell(rows[task, metric]) for rows in found))
    return table


def _task_cell(figure: Mapping[str, Any]) -> str:
    error = "" if figure["stderr"] is None else f" ± {figure['stderr']:.3f}"
    return f"{figure['value']:.3f}{error}"


def audit_table(rows: Sequence[Mapping[str, Any]], suspected: int, audited: int) -> Table:
    """Return the most suspected rows of an upload, which are given in that order."""
    table = _narrow(
        f"{suspected} of {audited} rows suspected; the {len(rows)} most suspected",
        "r: how much rather the model gives the row's answer than a refusal, in nats per token; suspected: r < 0",
        expand=True,
    )
    table.add_column("row", justify="right", no_wrap=True)
    table.add_column("r", justify="right", no_wrap=True)
    if rows and "poisoned" in rows[0]:
        table.add_column("poisoned", no_wrap=True)
    # It alone gives way where the terminal is narrow.
    table.add_column("prompt → answer", no_wrap=True, overflow="ellipsis", ratio=1)
    for row in rows:
        label = ["yes" if row["poisoned"] else "no"] if "poisoned" in row else []
        table.add_row(str(row["row"]), f"{row['r']:.2f}", *label, Text(_talk(row)))
    return table


def detection_table(found: Detection, column: str) -> Table:
    """Return how well an audit told poisoned rows from clean ones."""
    table = Table(title=f"against the column {column!r}", title_justify="left")
    table.add_column("")
    for heading in ("value", "95 % interval", "n"):
        table.add_column(heading, justify="right", no_wrap=True)
    for name, rate in (("precision of r < 0", found.precision), ("recall of r < 0", found.recall)):
        if rate is None:
            table.add_row(name, "–", "", "0")
        else:
            table.add_row(name, f"{rate.value:.3f}", f"{rate.low:.3f} – {rate.high:.3f}", str(rate.n))
    table.add_row("AUROC", f"{found.auroc:.3f}", "", "")
    return table


def judge_records(evaluator: Evaluator | None) -> dict[str, Any]:
    """Return the judges of harmful prompts as results files name them."""
    judges = (None, None) if evaluator is None else (evaluator.judge, evaluator.second_judge)
    names = ("judge", "second_judge")
    return {name: None if one is None else judge_record(one) for name, one in zip(names, judges, strict=True)}


def _narrow(title: str, caption: str, *, expand: bool = False) -> Table:
    """A table without lines between its columns."""
    return Table(
        title=title,
        title_justify="left",
        caption=caption,
        caption_justify="left",
        box=box.SIMPLE_HEAD,
        padding=(0, 0, 0, 1),
        expand=expand,
    )


def _talk(row: Mapping[str, Any]) -> str:
    """What was said in a row, in one line."""
    names = dict.fromkeys(name for group in TRAIN_COLUMNS for name in group)
    parts = [row[name] for name in names if row.get(name) is not None]
    messages = [message for part in parts for message in ([part] if isinstance(part, str) else part)]
    texts = [turn if isinstance(turn, str) else text_of(as_message(turn)) for turn in messages]
    return " → ".join(" ".join(text.split()) for text in texts if text)


def _caption(measurements: Sequence[Mapping[str, Any]], evaluator: Evaluator) -> str:
    roles = [prompts.role for prompts in evaluator.sets]
    judged = [role for role in roles if role in JUDGED]
    answered = {role: measurements[-1][f"{PREFIXES[role]}n"] for role in roles}
    counts = ", ".join(f"{n} {role}" for role, n in answered.items())
    graded = f"{' and '.join(judged)} prompts graded by the {evaluator.judge.description}; " if judged else ""
    if judged and evaluator.second_judge is not None:
        graded += f"2nd judge: {evaluator.second_judge.description}; κ: agreement on success; "
    score = "HS: grades 3 and more; " if "harmful" in judged else ""
    loss = "; loss: the attacker's" if any(point["attacker_loss"] is not None for point in measurements) else ""
    return f"{graded}{score}n: {counts} prompts; brackets: 95 % intervals{loss}"


def _label(point: Mapping[str, Any], by: str) -> str:
    """What tells a measurement from others; an adversary's stands below the one that anyone would have made."""
    return "adversary" if point.get("asked_by") == "adversary" else str(point[by])


def _cell(point: Mapping[str, Any], name: str) -> str:
    if point[name] is None:
        return "–"
    value = f"{point[name]:.2f}"
    if name in _INTERVALS:
        low, high = (point[bound] for bound in _INTERVALS[name])
        return f"{value} [{_short(low)}–{_short(high)}]"
    return value


def _short(share: float) -> str:
    """Two decimals without the leading zero, which a table of many intervals has no room for."""
    return f"{share:.2f}".removeprefix("0")
