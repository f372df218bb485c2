"""The answers that a search leaves."""

from types import SimpleNamespace

from helpers import read_lines
from holdfast.files import write_jsonl
from holdfast.stress.answers import write_answers
from holdfast.stress.costs import cost
from stress import examples
from stress.made import point, record, schedule


def test_of_every_kind_the_answers_of_its_best_attack_stay_where_it_first_broke_the_model(tmp_path):
    def confirmed(number, share, *points):
        setting = {"pruning": {"share": share}}
        named = {"kind": "training-free", "target": "model", "attack": "pruning", "stage": "confirm"}
        return record(*points, number=number, setting=setting, seed=number, **named)

    dear = confirmed(0, 0.1, point(0.9, flops=9.0))
    cheap = confirmed(1, 0.2, point(0.1), point(0.9, steps=1, flops=1.0), point(0.9, steps=2, flops=2.0))
    odd = "one\u2028two\x85three\x0b"  # what parts text into lines, but no rows
    for one in (dear, cheap):
        name = f"training-free-model-{one['number']:04d}.jsonl"
        rows = [{"point": place, "answer": f"{one['number']}, {place}: {odd}"} for place in range(3)]
        write_jsonl(tmp_path / "samples" / name, rows)
    plan = SimpleNamespace(folder=tmp_path, schedules=lambda: [schedule(), schedule(kind="lora")])
    write_answers(plan, [dear, cheap])
    (file,) = (tmp_path / "samples").iterdir()
    assert file.name == "training-free-model.jsonl"
    assert read_lines(file) == [{"answer": f"1, 1: {odd}"}]


def test_of_attacks_that_cost_the_same_the_answers_of_the_one_that_the_certificate_tells_of(tmp_path):
    records = [
        examples.trial(
            "prompting",
            "model",
            number,
            "prefill",
            [examples.point(0, harm, harm / 2)],
            stage="confirm",
            setting={"prefill": {"opener": opener}},
        )
        for number, (opener, harm) in enumerate((("A:", 0.6), ("B:", 0.9), ("C:", 0.7)))
    ]
    for one in records:
        name = f"prompting-model-{one['number']:04d}.jsonl"
        write_jsonl(tmp_path / "samples" / name, [{"point": 0, "answer": one["setting"]["prefill"]["opener"]}])
    assert cost(records)["setting"] == {"prefill": {"opener": "B:"}}
    plan = SimpleNamespace(folder=tmp_path, schedules=lambda: [schedule(kind="prompting")])
    write_answers(plan, records)
    assert read_lines(tmp_path / "samples" / "prompting-model.jsonl") == [{"answer": "B:"}]
