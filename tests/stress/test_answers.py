"""The answers that a search leaves."""

from types import SimpleNamespace

from helpers import read_lines
from holdfast.files import write_jsonl
from holdfast.stress.answers import write_answers
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
