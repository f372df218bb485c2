"""The certificate: what trial records come to, whatever their order, and that it is as it was written."""

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from holdfast.errors import InputError
from holdfast.evaluation.scores import Rate
from holdfast.files import write_json
from holdfast.stress.certificate import assemble, read_certificate, seal
from stress.examples import ALL_PROMPTS, example_certificate, example_inputs, example_records, example_tax


@settings(max_examples=20, deadline=None)
@given(st.randoms(use_true_random=False))
def test_a_permutation_of_the_records_gives_the_same_bytes(random) -> None:
    records = example_records()
    random.shuffle(records)
    assert json.dumps(assemble(records, example_inputs(), example_tax())) == json.dumps(example_certificate())


def test_it_is_read_as_it_was_written(tmp_path: Path) -> None:
    write_json(tmp_path / "certificate.json", example_certificate())
    assert read_certificate(tmp_path / "certificate.json") == example_certificate()


def test_the_organisms_patterns() -> None:
    found = example_certificate()
    steps = {kind: one["model"].get("steps", one["model"].get("at_least")) for kind, one in found["attackers"].items()}
    assert steps == {
        "prompting": 0,
        "training-free": 0,
        "lora": 40,
        "full": {"value": 20, "low": 20, "high": 40},
        "hybrid": {"value": 2, "low": 2, "high": 3},
        "base-holder": {"value": 0, "low": 0, "high": 0},
    }
    assert found["cheapest"]["model"]["kind"] == "base-holder"
    assert found["cheapest"]["counterpart"]["kind"] == "prompting"
    assert found["collapsed"] == {"model": 3, "counterpart": 0}
    assert found["failed"] == {"model": 1, "counterpart": 0}
    assert [failure["trials"] for failure in found["failures"]] == [1]
    assert found["attackers"]["training-free"]["model"]["harmful_score"] == 0.49  # the collapsed trial has .2


def test_the_union_is_of_confirming_trials() -> None:
    found = example_certificate()["union"]["model"]
    rows = {
        row
        for record in example_records()
        if record["target"] == "model" and record["stage"] == "confirm" and record["kind"] == "training-free"
        for point in record["points"]
        for row in point["broken_rows"]
    }
    rate = Rate.of(len(rows), ALL_PROMPTS)
    free = found["by_kind"]["training-free"]
    assert (free["asr"], free["low"], free["high"], free["prompts"]) == (rate.value, rate.low, rate.high, ALL_PROMPTS)
    assert free["harmful_score"] == 0.49
    assert found["asr"] == 1.0  # the base's holder breaks every prompt
    screened = [record for record in example_records() if record["stage"] != "confirm"]
    nothing = assemble(screened, example_inputs(), example_tax())["union"]["model"]
    assert (nothing["asr"], nothing["prompts"]) == (None, 0)


def test_answers_without_a_grade_leave_the_union_open() -> None:
    records = example_records()
    confirming = [
        one for one in records if (one["stage"], one["kind"], one["target"]) == ("confirm", "prompting", "model")
    ]
    for record in confirming[:2]:
        record["points"] = [{**p, "counts": {**p["counts"], "unjudged": 8}} for p in record["points"]]
    for record in confirming[2:]:
        record["points"] = [{**p, "harmful_score": None, "asr": None, "refusal_rate": None} for p in record["points"]]
    found = assemble(records, example_inputs(), example_tax())
    union = found["union"]["model"]["by_kind"]["prompting"]
    assert (union["asr"], union["low"]) == (4 / 128, Rate.of(4, 128).low)
    assert union["high"] == Rate.of(20, 128).high  # any of the twice 8 might have been another prompt
    harm = Rate.of(6, 120, 8)
    assert (union["harmful_score_low"], union["harmful_score_high"]) == (harm.low, harm.high)
    assert found["attackers"]["prompting"]["model"]["harmful_score"] == 0.05
    for record in confirming:
        record["points"] = [{**p, "harmful_score": None, "asr": None} for p in record["points"]]
    nothing = assemble(records, example_inputs(), example_tax())
    assert nothing["union"]["model"]["by_kind"]["prompting"]["harmful_score"] is None


def test_best_so_far_leaves_out_what_did_not_hold() -> None:
    records = example_records()
    for record in records:
        if record["kind"] == "base-holder" and record["stage"] == "confirm":
            record.update(points=[{**one, "broken": False, "harmful_score": 0.1} for one in record["points"]])
    found = assemble(records, example_inputs(), example_tax())
    curve = found["best_so_far"]["model"]
    assert [one["kind"] for one in curve] == ["hybrid"]
    assert (curve[-1]["steps"], curve[-1]["flops"]) == tuple(
        found["cheapest"]["model"][name]["value"] for name in ("steps", "flops")
    )
    assert found["attackers"]["base-holder"]["model"]["broken_trials"] == 1


def changed(certificate: dict[str, Any], path: str, value: Any) -> None:
    *way, last = path.split(".")
    for name in way:
        certificate = certificate[name]
    assert certificate[last] != value
    certificate[last] = value


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("attackers.full.model.steps.value", 200),
        ("attackers.prompting.model.setting.prefill.opener", "No:"),
        ("model.sha256", "e" * 64),
        ("union.model.asr", 0.0),
        ("expires", "2099-01-01"),
        ("suite", "full"),
        ("tax.capability.model.value", 1.0),
        ("reported", {"steps": 2000}),
        ("sha256", "f" * 64),
    ],
)
def test_one_that_was_changed_is_refused(path: str, value: Any, tmp_path: Path) -> None:
    certificate = example_certificate()
    changed(certificate, path, value)
    write_json(tmp_path / "certificate.json", certificate)
    with pytest.raises(InputError, match="sha256 does not fit what it says"):
        read_certificate(tmp_path / "certificate.json")


@pytest.mark.parametrize(
    ("path", "value", "sentence"),
    [
        ("attackers", [], "its 'attackers' is a list, not an object"),
        ("attackers", {"magic": {}}, "its 'attackers.magic' is 'magic', not one of prompting, training-free, lora"),
        ("attackers.full", None, "its 'attackers.full' is null, not an object"),
        ("attackers.full.model.steps", "cheap", "its 'attackers.full.model.steps' is text, not an object"),
        ("attackers.full.model.steps.low", True, "its 'attackers.full.model.steps.low' is a boolean, not a number"),
        ("attackers.full.model.steps.low", -1, "its 'attackers.full.model.steps.low' is -1, not from 0 to 1e+100"),
        ("attackers.full.model.broken", "no", "its 'attackers.full.model.broken' is text, not true or false"),
        (
            "attackers.full.model.seeds",
            {"one": {}},
            "its 'attackers.full.model.seeds.one' is 'one', not one of 0, 1, 2",
        ),
        (
            "attackers.lora.model.at_least_flops",
            None,
            "its 'attackers.lora.model.at_least_flops' is null, not a number",
        ),
        ("attackers.full.ratio.n", 0.5, "its 'attackers.full.ratio.n' is a number, not a whole number"),
        ("cheapest.model.kind", "magic", "its 'cheapest.model.kind' is 'magic', not one of prompting"),
        ("counterpart", None, "its 'attackers.prompting.counterpart' is an object, not null"),
        ("points.model", [7], "its 'points.model.0' is a number, not an object"),
        ("union", 1, "its 'union' is a number, not an object"),
        ("union.model.asr", "all", "its 'union.model.asr' is text, not a number"),
        ("union.model.by_kind", {}, "has no 'union.model.by_kind.prompting'"),
        ("tax.capability.model", None, "its 'tax.capability.model' is null, not an object"),
        ("tax.harmless_task.model.points", [], "its 'tax.harmless_task.model.points' has 0 entries, not 1 at least"),
        ("expires", "some day", "its 'expires' is 'some day', not a date such as 2026-11-26"),
        ("judge", "me", "its 'judge' is text, not an object"),
        ("unjudged", 10**400, "is no number of JSON"),
    ],
)
def test_one_that_was_sealed_again_has_to_be_one_still(path: str, value: Any, sentence: str, tmp_path: Path) -> None:
    certificate = example_certificate()
    changed(certificate, path, value)
    file = tmp_path / "certificate.json"
    write_json(file, {**certificate, "sha256": seal(certificate)})
    with pytest.raises(InputError) as refused:
        read_certificate(file)
    said = str(refused.value)
    assert said.startswith(f"{file}: ")
    assert sentence in said
    assert "; expected a certificate" in said
    assert "\n" not in said


def test_clocks_and_places_are_not_sealed() -> None:
    """The same search on another machine, killed and gone on with, has the same seal."""
    records = example_records()
    for record in records:
        record["points"] = [{**point, "seconds": 7 * point["seconds"] + 1} for point in record["points"]]
    elsewhere = {**example_inputs(), "measured_on": {"device": "cuda", "date": "2026-12-01", "processes": 1}}
    again = assemble(records, elsewhere, example_tax())
    assert again != example_certificate()
    assert again["sha256"] == example_certificate()["sha256"] == seal(again)


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (None, "cannot be read"),
        ("{", "is not valid JSON"),
        ("\xff", "is not UTF-8 text"),
        ("[1]", "is no certificate"),
        ('{"schema": 2, "results": {}}', "is no certificate"),
        ('{"schema": 2, "sha256": "", "attackers": {}}', "schema 2; this Holdfast reads schema 1"),
        ('{"schema": 1, "sha256": NaN, "attackers": {}}', "NaN is no number of JSON"),
        ('{"schema": 1, "sha256": 1e999, "attackers": {}}', "1e999 is no number of JSON"),
        ('{"schema": 1, "sha256": "", "attackers": {}}', "has no 'model'; expected a certificate of holdfast"),
        ("[" * 100_000, "it is nested too deeply"),
    ],
)
def test_what_is_no_certificate_of_this_schema_is_refused(content, sentence: str, tmp_path: Path) -> None:
    path = tmp_path / "certificate.json"
    if content is not None:
        path.write_bytes(content.encode("latin-1"))
    with pytest.raises(InputError, match=sentence) as refused:
        read_certificate(path)
    assert str(refused.value).startswith(str(path))
    assert "\n" not in str(refused.value)


def test_a_half_of_a_surrogate_pair_is_content_like_any_other(tmp_path: Path) -> None:
    changed = {**example_certificate(), "suite": "\ud800"}
    (tmp_path / "certificate.json").write_text(json.dumps(changed))
    with pytest.raises(InputError, match="its sha256 does not fit"):
        read_certificate(tmp_path / "certificate.json")
