"""Which rows of a data set are meant, and which of its columns is what: by its mapping, or by a shape that is known."""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
from datasets import ClassLabel, Dataset, Features, Json

from holdfast.data.formats import as_message
from holdfast.data.readers import in_memory
from holdfast.data.sources import Part, asking
from holdfast.errors import InputError

Groups = Sequence[Sequence[str]]
"""Groups of columns, the first of which that is there is used."""

MAPPED = (
    *("prompt", "completion", "messages", "answer", "system", "tools", "chat_template_kwargs"),
    *("instruction", "input", "output", "chosen", "rejected"),
)
"""What columns may be mapped to: what rows are made of, and what shapes are read from."""

SAFE_COLUMNS = ("is_safe", "is_response_safe")
"""Columns that say whether the answer of a row is safe, as BeaverTails and its kin have them."""

_PROMPT, _COMPLETION, _ANSWER = "prompt", "completion", "answer"
# Shapes that are read without being told, by what is made of their columns. An input follows its instruction.
_SHAPES: tuple[Mapping[str, str], ...] = (
    {_PROMPT: "instruction", _COMPLETION: "output", _ANSWER: "output"},
    {_PROMPT: "question", _COMPLETION: "answer", _ANSWER: "answer"},
    {_PROMPT: "goal", _COMPLETION: "target"},
    {_PROMPT: "Goal", _COMPLETION: "Target"},
    {_PROMPT: "forbidden_prompt"},
    {_PROMPT: "Behavior"},
)
_PAIR = ("chosen", "rejected")
# PKU-SafeRLHF: two answers, each with its label.
_JUDGED = {f"response_{number}": f"is_response_{number}_safe" for number in range(2)}
_JUDGED_COLUMNS = (*_JUDGED, *_JUDGED.values())


def truth(value: Any) -> bool | None:
    """True or false as JSON, Parquet and CSV have them; None for anything else."""
    text = str(value).lower()
    return True if text in ("true", "1") else False if text in ("false", "0") else None


def read_from(part: Part) -> set[str]:
    """The columns that a source may be read from, which are text whatever they look like."""
    mapped = {column for spec in (part.columns or {}).values() if (column := _column(spec)) is not None}
    return {*MAPPED, *(column for shape in _SHAPES for column in shape.values()), *mapped}


def _column(spec: Any) -> str | None:
    """The column that something is mapped to; None if to none."""
    column = spec.get("column") if isinstance(spec, Mapping) else spec
    return column if isinstance(column, str) else None


def arrow(rows: Dataset) -> pa.Table:
    """The rows as Arrow has them, those that were selected alone."""
    return rows.with_format("arrow")[:]


def taken(
    rows: Dataset, part: Part, groups: Groups, *, flag: str
) -> tuple[Dataset, list[int] | None, Mapping[str, str]]:
    """The rows that are meant, with the columns that are looked for.

    Args:
        rows: All rows.
        part: What was asked for: `where`, then `columns`, then `take`, then `limit`.
        groups: The columns that are looked for; none: rows are left with the columns that they have.
        flag: The flag that named them, for errors.

    Returns:
        The rows; the number of each, from 1, in `rows`, None where row follows row from the first on; and by column,
        where it was made of another, what that is called.

    Raises:
        InputError: A column is missing, is no text where a text is made of it, or no row is left; or the rows are of no
            shape that is known.
    """
    numbers: pa.Array | None = None
    made_of: dict[str, str] = {}
    if part.where:
        keep = _where(rows, part, flag)
        rows, numbers = in_memory(arrow(rows).filter(keep), rows.features), pc.add(pc.indices_nonzero(keep), 1)
    if part.columns is not None:
        rows = _mapped(rows, part, flag, numbers)
        made_of |= {name: column for name, spec in part.columns.items() if (column := _column(spec)) is not None}
    if part.take is not None:
        rows, places = _side(rows, part, flag, numbers)
        if places is not None:
            numbers = pc.add(places, 1) if numbers is None else numbers.take(places)
        if part.take in _PAIR:
            made_of |= dict.fromkeys(("messages", _COMPLETION), str(part.take))
    if part.limit is not None and part.limit < len(rows):
        rows = in_memory(arrow(rows).slice(0, part.limit), rows.features)
        numbers = None if numbers is None else numbers.slice(0, part.limit)
    if groups:
        rows, sources = _shaped(rows, part, groups, flag, numbers)
        made_of |= {name: made_of.get(source, source) for name, source in sources.items()}
    return rows, None if numbers is None else numbers.to_pylist(), made_of


def with_columns(rows: Dataset, made: Mapping[str, Any], *, without: Collection[str] = ()) -> Dataset:
    """The rows with columns that were made of others, and without these."""
    table, more = arrow(rows), pa.table(dict(made))
    kept = [name for name in rows.column_names if name not in made and name not in without]
    features = {name: rows.features[name] for name in kept} | dict(Features.from_arrow_schema(more.schema))
    columns = [*(table[name] for name in kept), *more.columns]
    return in_memory(pa.table(columns, names=[*kept, *more.column_names]), Features(features))


# ---------------------------------------------------------------------- where


def _where(rows: Dataset, part: Part, flag: str) -> pa.ChunkedArray:
    """Whether each row has the values that are asked for."""
    keep: Any = None
    for column, wanted in (part.where or {}).items():
        if column not in rows.column_names:
            raise InputError(f"{flag} {part.label}: where asks for the column {column!r}, but {_columns(rows)}")
        wanted = wanted if isinstance(wanted, list) else [wanted]
        if not wanted:
            raise InputError(
                f"{flag} {part.label}: where has an empty list for the column {column!r}, which no row fits"
            )
        cells, values = values_of(rows, column, f"{flag} {part.label}: where asks for the column {column!r}")
        names = feature.names if isinstance(feature := rows.features[column], ClassLabel) else []
        fits = [place for place, value in enumerate(values) if any(_equal(value, one, names) for one in wanted)]
        if not fits:
            found = ", ".join(repr(value)[:30] for value in values[:5])
            more = f" and {len(values) - 5} more" if len(values) > 5 else ""
            raise InputError(
                f"{flag} {part.label}: where leaves no row, since none has {json.dumps(wanted)[1:-1]} in {column!r}; "
                f"there are {found}{more}"
            )
        here = pc.is_in(cells, value_set=pa.array(fits))
        keep = here if keep is None else pc.and_(keep, here)
    if not pc.any(keep).as_py():
        raise InputError(f"{flag} {part.label}: where leaves no row that fits {json.dumps(part.where)}")
    return keep


def values_of(rows: Dataset, column: str, where: str) -> tuple[pa.Array, list[Any]]:
    """Which of its different values each row has in a column, by their places; and these values.

    Raises:
        InputError: They are lists or objects; begins with `where`.
    """
    cells = arrow(rows)[column]
    if isinstance(rows.features[column], Json):  # values of several kinds
        found = list(rows[column])
        written = [json.dumps(value) for value in found]
        values = dict(zip(written, found, strict=True))
        if not any(isinstance(value, dict | list) for value in values.values()):
            places = {text: place for place, text in enumerate(values)}
            return pa.array([places[text] for text in written]), list(values.values())
    elif not pa.types.is_nested(cells.type):
        coded = cells.dictionary_encode(null_encoding="encode").combine_chunks()
        return coded.indices, coded.dictionary.to_pylist()
    raise InputError(f"{where}, which holds neither text, numbers nor truth values")


def _equal(value: Any, wanted: Any, names: Sequence[str]) -> bool:
    if isinstance(wanted, bool):
        return value is not None and truth(value) is wanted
    if value is None or wanted is None:
        return value is wanted
    if isinstance(value, int) and value < len(names) and names[value] == wanted:
        return True
    return str(value) == str(wanted) or (not isinstance(value, bool) and bool(value == wanted))  # 1.0 is 1


# ---------------------------------------------------------------------- columns


def _mapped(rows: Dataset, part: Part, flag: str, numbers: pa.Array | None) -> Dataset:
    """The rows with every column that was mapped under its new name, and without those it was made of."""
    made: dict[str, Any] = {}
    used: set[str] = set()
    for name, spec in (part.columns or {}).items():
        where = f"{flag} {part.label}: columns[{name}]"
        if name not in MAPPED:
            raise InputError(f"{where}: there is no such name; expected some of {', '.join(MAPPED)}")
        if isinstance(spec, Mapping) and set(spec) == {"text"} and isinstance(spec["text"], str):
            made[name] = pa.array([spec["text"]] * len(rows), pa.string())
            continue
        column = spec.get("column") if isinstance(spec, Mapping) and set(spec) in _MADE else spec
        if not isinstance(column, str):
            raise InputError(
                f"{where} must be a column, or one of {{column, after}}, {{column, words}} and {{text}}, got "
                f"{json.dumps(spec)}"
            )
        source, item = _place(column, rows, where)
        used.add(source)
        if item is None and isinstance(spec, str):
            made[name] = arrow(rows)[source]
        else:
            made[name] = _texts(rows[source], *_making(spec, item, where), f"{where}: {source!r}", numbers)
    return with_columns(rows, made, without=used)


def _place(column: str, rows: Dataset, where: str) -> tuple[str, int | None]:
    """A column's name and, as in `turns[0]`, which item of its lists."""
    if column in rows.column_names:
        return column, None
    name, _, number = column.removesuffix("]").partition("[")
    if name in rows.column_names and number.isdecimal():
        return name, int(number)
    raise InputError(f"{where} asks for the column {column!r}, but {_columns(rows)}")


_MADE = ({"column", "after"}, {"column", "words"})


def _making(spec: Any, item: int | None, where: str) -> tuple[Callable[[Any], Any], str]:
    """What makes a text of a cell, and what it expects."""
    if isinstance(spec, str):
        assert item is not None  # a column as it stands is not made
        return (lambda cell: cell[item] if isinstance(cell, list) else None), f"a list with a text at {item}"
    if "after" in spec:
        after = spec["after"]
        if not isinstance(after, str) or not after:
            raise InputError(f"{where}: after must be a text, and not empty, got {json.dumps(after)}")
        return (lambda cell: cell[cell.rindex(after) + len(after) :]), f"text with {after!r} in it"
    words = spec["words"]
    by_label = dict(enumerate(words)) if isinstance(words, list) else words
    if not isinstance(by_label, Mapping) or {type(word) for word in by_label.values()} != {str}:
        raise InputError(f"{where}: words must be a list of texts, or a mapping to them, got {json.dumps(words)}")
    by_text = {_label(label): word for label, word in by_label.items()}
    return (lambda cell: by_text[_label(cell)]), f"one of {', '.join(by_text)}"


def _label(value: Any) -> str:
    """A label as a text; true and false as JSON has them, wherever they are from."""
    return str(value).lower() if truth(value) is not None else str(value)


def _texts(cells: Any, make: Callable[[Any], Any], expected: str, where: str, numbers: pa.Array | None) -> pa.Array:
    """A text of every cell."""
    found = []
    for place, cell in enumerate(cells):
        try:
            text = make(cell)
        except (AttributeError, IndexError, KeyError, TypeError, ValueError):
            text = None
        if not isinstance(text, str):
            raise InputError(f"{where} of row {_number(place, numbers)} is not {expected}")
        found.append(text)
    return pa.array(found, pa.string())


def _number(place: int, numbers: pa.Array | None) -> int:
    """The number in the source, from 1, of the row at a place among those that were taken of it."""
    return place + 1 if numbers is None else int(numbers[place].as_py())


# ---------------------------------------------------------------------- which of two answers is meant


def _side(rows: Dataset, part: Part, flag: str, numbers: pa.Array | None) -> tuple[Dataset, pa.Array | None]:
    """The rows with the answers of one side; and the place of each in `rows`, unless they are all of them."""
    needed = [part.take] if part.take in _PAIR else _JUDGED_COLUMNS
    if lacking := [name for name in needed if name not in rows.column_names]:
        raise InputError(
            f"{flag} {part.label}: take {part.take} asks for the column {lacking[0]!r}, but {_columns(rows)}"
        )
    if part.take in _PAIR:
        return _one_of_pair(rows, str(part.take)), None
    judged = [(list(rows[answer]), list(rows[label]), label) for answer, label in _JUDGED.items()]
    places, answers = [], []
    for place in range(len(rows)):
        for texts, labels, column in judged:
            if (safe := truth(labels[place])) is None:
                raise InputError(
                    f"{flag} {part.label}: {column!r} of row {_number(place, numbers)} is {labels[place]!r}; expected "
                    "true or false"
                )
            if safe is (part.take == "safe"):
                places.append(place)
                answers.append(texts[place])
    if not places:
        raise InputError(f"{flag} {part.label}: take {part.take} leaves no row")
    where = pa.array(places)
    rows = with_columns(in_memory(arrow(rows).take(where), rows.features), {_COMPLETION: answers}, without=needed)
    return rows, where


def _one_of_pair(rows: Dataset, side: str) -> Dataset:
    """The rows with one answer of a preference: a talk that ends with it, as TRL has them, or the answer alone."""
    cells, first = arrow(rows)[side], rows[0][side]
    turn = as_message(first[0]) if isinstance(first, list) and first else None
    is_talk = isinstance(turn, dict) and turn.get("role") != "assistant"
    name, dropped = ("messages", {*_PAIR, "messages", _PROMPT}) if is_talk else (_COMPLETION, {*_PAIR, _COMPLETION})
    return with_columns(rows, {name: cells}, without=dropped)


# ---------------------------------------------------------------------- shapes


def _shaped(
    rows: Dataset, part: Part, groups: Groups, flag: str, numbers: pa.Array | None
) -> tuple[Dataset, Mapping[str, str]]:
    """The rows with one of the groups of columns, made of what they have; and what of what."""
    columns = set(rows.column_names)
    if any(set(group) <= columns for group in groups):
        return rows, {}
    for side, pair in (("chosen", _PAIR), ("unsafe", _JUDGED_COLUMNS)):
        if columns.issuperset(pair):
            raise InputError(
                f"{flag} {part.label} has pairs of answers, and nothing says which of the two are meant; say it, as in "
                f"{asking(flag, part, take=side)}"
            )
    for shape in _SHAPES:
        for group in groups:
            sources = {name: str(shape.get(name, _ANSWER if name == _ANSWER else None)) for name in group}
            if set(sources.values()) <= columns:
                return _read(rows, sources, f"{flag} {part.label}", numbers), sources
    wanted = " or ".join(" + ".join(repr(name) for name in group) for group in groups)
    spare = iter([name for name in rows.column_names if name not in MAPPED])
    mapping = {name: name if name in columns else next(spare, "…") for name in groups[0]}
    raise InputError(
        f"{flag} {part.label} has no column {wanted}; {_columns(rows)}; say which is which, as in "
        f"{asking(flag, part, columns={**mapping, **(part.columns or {})})}"
    )


def _read(rows: Dataset, sources: Mapping[str, str], where: str, numbers: pa.Array | None) -> Dataset:
    """The rows with these columns, made of those of a shape."""
    made = {name: arrow(rows)[source] for name, source in sources.items() if name != source}
    used = set(sources.values()) - set(sources)
    if sources[_PROMPT] == "instruction" and "input" in rows.column_names:
        made[_PROMPT] = _joined(rows, where, numbers)
        used.add("input")
    return with_columns(rows, made, without=used)


def _joined(rows: Dataset, where: str, numbers: pa.Array | None) -> pa.ChunkedArray:
    """Instructions with their inputs, where they have any, a blank line between the two."""
    table = arrow(rows)
    for name in ("instruction", "input"):
        if not (
            pa.types.is_string(kind := table[name].type) or pa.types.is_large_string(kind) or pa.types.is_null(kind)
        ):
            place = next((i for i, cell in enumerate(rows[name]) if not (cell is None or isinstance(cell, str))), 0)
            raise InputError(f"{where}: {name!r} of row {_number(place, numbers)} is no text")
    instruction, more = (pc.cast(table[name], pa.string()) for name in ("instruction", "input"))
    both = pc.binary_join_element_wise(instruction, more, "\n\n")
    return pc.if_else(pc.equal(pc.fill_null(pc.utf8_trim_whitespace(more), ""), ""), instruction, both)


def _columns(rows: Dataset) -> str:
    return f"its columns are {', '.join(map(repr, rows.column_names))}"
