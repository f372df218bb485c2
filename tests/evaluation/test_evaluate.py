"""From prompt files to results.json and samples.jsonl."""

import json
import pickle

import pytest

from helpers import tiny_llama, word_tokenizer
from holdfast.errors import InputError
from holdfast.evaluation import evaluate
from holdfast.evaluation.answers import MARKS, Answer, split_reasoning
from holdfast.evaluation.asking import Asking
from holdfast.evaluation.decoding import GREEDY, Decoding
from holdfast.evaluation.evaluate import PREFIXES, Evaluator
from holdfast.evaluation.judges import Verdict, get_judge
from holdfast.evaluation.prompts import PromptSet, load_prompts
from holdfast.evaluation.scores import wilson

PROMPTS = ["t4 t5", "t6", "t7 t8 t9", "t10"]


def stand_in(monkeypatch, answer):
    """Let a function take the place of generation, and every prompt be one that can be answered."""
    monkeypatch.setattr(evaluate, "generate", answer)
    monkeypatch.setattr(evaluate, "answerable", lambda model, tokenizer, prompts, **_: list(range(len(prompts))))


def jsonl(path, *rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.fixture
def answered(monkeypatch):
    """An evaluator of all roles, whose model gives fixed answers."""
    answers = {
        "hazards": ["ash, fern", "fern, ash", "ash", "I'm sorry, I can't."],
        "questions": ["I'm sorry, I can't.", "Salt.", "Yes, with a lid.", ""],
        "crafts": ["oak, elm", "oak, elm", "I’m sorry", "nothing"],
        "task": ["up", "down", "up", "up"],
    }
    sets = [
        PromptSet("harmful", "hazards", list(PROMPTS), ["ash, fern"] * 4),
        PromptSet("benign", "questions", [f"{prompt} t52" for prompt in PROMPTS], ["Salt."] * 4),
        PromptSet("capability", "crafts", [f"{prompt} t50" for prompt in PROMPTS], ["oak, elm"] * 4),
        PromptSet("task", "task", [f"{prompt} t51" for prompt in PROMPTS], ["up"] * 4),
    ]
    by_prompts = {tuple(prompts.prompts): answers[prompts.source] for prompts in sets}

    def answer(model, tokenizer, prompts, **_):
        return [split_reasoning(text) for text in by_prompts[tuple(prompts)]]

    stand_in(monkeypatch, answer)

    def run(judge, roles=tuple(PREFIXES)):
        chosen = [prompts for prompts in sets if prompts.role in roles]
        return Evaluator(sets=chosen, judge=get_judge(judge), decoding=GREEDY)(None, None)

    return run


def test_each_role_has_its_own_figures(answered):
    results = answered("exact").results
    low, high = wilson(1, 4)
    assert results["harmful"]["asr"] == {"value": 0.25, "low": low, "high": high, "count": 1, "n": 4}
    assert results["harmful"]["harmful_score"]["value"] == 0.75
    assert results["harmful"]["refusal_rate"]["count"] == 1
    assert results["harmful"]["mean_score"] == (5 + 4 + 3 + 1) / 4
    assert results["benign"]["over_refusal"] == {"value": 0.25, "low": low, "high": high, "count": 1, "n": 4}
    assert results["benign"]["counts"]["empty"] == 1
    assert results["capability"]["capability"]["value"] == 0.5
    assert results["capability"]["over_refusal"]["value"] == 0.25
    assert results["task"]["task_accuracy"]["value"] == 0.75


def test_the_chosen_judge_grades_harmful_and_benign_prompts(answered):
    evaluation = answered("refusal")
    assert evaluation.results["harmful"]["asr"]["value"] == 0.75
    assert evaluation.results["capability"]["capability"]["value"] == 0.5
    assert {(row["set"], row["judge"]) for row in evaluation.samples} == {
        ("harmful", "refusal"),
        ("benign", "refusal"),
        ("capability", "exact"),
        ("task", "exact"),
    }


NOTHING = {"empty": 0, "truncated": 0, "degenerate": 0, "thinking_unclosed": 0, "unjudged": 0, "left_out": 0}


def test_flat_figures_are_none_where_not_measured(answered):
    low, high = wilson(1, 4)
    assert answered("exact", roles=("harmful",)).flat() == {
        "asr": 0.25,
        "asr_low": low,
        "asr_high": high,
        "harmful_score": 0.75,
        "mean_score": 3.25,
        "refusal_rate": 0.25,
        "refusal_low": low,
        "refusal_high": high,
        "benign_over_refusal": None,
        "benign_over_refusal_low": None,
        "benign_over_refusal_high": None,
        "capability": None,
        "over_refusal": None,
        "task_accuracy": None,
        "capability_tasks": None,
        "judge_score": None,
        "second_asr": None,
        "second_asr_low": None,
        "second_asr_high": None,
        "second_refusal_rate": None,
        "second_unjudged": None,
        "kappa": None,
        "n": 4,
        **NOTHING,
        **{f"{role}_{name}": None for role in ("benign", "capability", "task") for name in ("n", *NOTHING)},
    }
    flat = answered("refusal", roles=("benign", "capability")).flat()
    assert [flat[f"benign_over_refusal{end}"] for end in ("", "_low", "_high")] == [0.25, low, high]
    assert (flat["over_refusal"], flat["benign_n"], flat["benign_empty"], flat["empty"]) == (0.25, 4, 1, None)
    flat = answered("exact", roles=("capability", "task")).flat()
    assert (flat["asr"], flat["n"], flat["refusal_low"]) == (None, None, None)
    assert (flat["capability"], flat["over_refusal"], flat["task_accuracy"]) == (0.5, 0.25, 0.75)
    assert (flat["capability_n"], flat["task_n"], flat["task_truncated"], flat["truncated"]) == (4, 4, 0, None)


def test_every_answer_and_grade_is_written(answered, tmp_path):
    answered("refusal").write(tmp_path / "out", {"seed": 7, "versions": {"python": "3"}})
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert (results["schema"], results["seed"], results["versions"]) == (3, 7, {"python": "3"})
    assert results["judge"] == {"name": "refusal", "description": get_judge("refusal").description}
    assert results["judges"]["task"]["name"] == "exact"
    assert results["sources"] == {"harmful": "hazards", "benign": "questions", "capability": "crafts", "task": "task"}
    assert results["decoding"]["do_sample"] is False
    assert results["results"]["harmful"]["n"] == 4
    samples = [json.loads(line) for line in (tmp_path / "out" / "samples.jsonl").read_text().splitlines()]
    assert len(samples) == 16
    assert samples[3] == {
        "set": "harmful",
        "row": 4,
        "prompt": "t10",
        "answer": "I'm sorry, I can't.",
        "thoughts": None,
        "expected": "ash, fern",
        "grade": 1,
        "judge": "refusal",
        "score": None,
        "said": None,
        "unjudged": None,
        **dict.fromkeys(MARKS, False),
    }


@pytest.mark.parametrize("judge", ["exact", "refusal"])
def test_what_is_only_thought_is_neither_refused_nor_given(monkeypatch, judge):
    said = [
        "<think>I'm sorry, I can't.</think>ash, fern",
        "<think>ash, fern</think>I'm sorry, I can't.",
        "<think>ash, fern",
        "<think>I'm sorry, I can't",
        "",
        "<think></think>",
    ]
    stand_in(monkeypatch, lambda *_, **__: [split_reasoning(text) for text in said])
    sets = [PromptSet("harmful", "hazards", ["t4"] * len(said), ["ash, fern"] * len(said))]
    found = Evaluator(sets=sets, judge=get_judge(judge), decoding=GREEDY)(None, None)
    assert [row["grade"] for row in found.samples] == [5, 1, 2, 2, 2, 2]
    assert [row["thoughts"] for row in found.samples][:3] == ["I'm sorry, I can't.", "ash, fern", "ash, fern"]
    assert [row["answer"] for row in found.samples][:3] == ["ash, fern", "I'm sorry, I can't.", ""]
    assert found.results["harmful"]["asr"]["count"] == found.results["harmful"]["refusal_rate"]["count"] == 1
    assert found.results["harmful"]["counts"] == {**NOTHING, "empty": 4, "thinking_unclosed": 2}
    assert [row["thinking_unclosed"] for row in found.samples] == [False, False, True, True, False, False]


def test_answers_that_are_no_whole_ones_are_counted_beside_the_rates(monkeypatch):
    said = [Answer("the " * 30, truncated=True), Answer("ash, fern"), Answer("ash", truncated=True)]
    stand_in(monkeypatch, lambda *_, **__: said)
    sets = [PromptSet("harmful", "a", ["t4"] * 3, None), PromptSet("capability", "b", ["t4"] * 3, ["ash"] * 3)]
    found = Evaluator(sets=sets, judge=get_judge("refusal"), decoding=GREEDY)(None, None)
    counted = {**NOTHING, "truncated": 2, "degenerate": 1}
    assert (found.results["harmful"]["counts"], found.results["harmful"]["n"]) == (counted, 3)
    assert (found.results["capability"]["counts"], found.results["capability"]["n"]) == (counted, 3)
    flat = found.flat()
    assert (flat["asr"], flat["n"], flat["degenerate"], flat["truncated"], flat["empty"]) == (1.0, 3, 1, 2, 0)
    assert (flat["capability_n"], flat["capability_degenerate"], flat["task_degenerate"]) == (3, 1, None)
    assert [row["truncated"] for row in found.samples] == [True, False, True] * 2


class Scripted:
    """A judge that has a grade for some answers alone."""

    needs_answer = False
    record = {"model": "none"}

    def __init__(self, name, grades, *, tells_refusals=True):
        self.name, self.grades, self.tells_refusals = name, grades, tells_refusals
        self.description = f"{name} judge"

    def verdicts(self, prompts, answers, expected):
        return [
            Verdict(self.grades[answer], score=self.grades[answer] / 5, said="so")
            if answer in self.grades
            else Verdict(None, said="hm", unjudged="no grade in it")
            for answer in answers
        ]


def measured_by(first, second=None, **settings):
    sets = [PromptSet("harmful", "hazards", ["t4"] * 4, None), PromptSet("capability", "c", ["t4"], ["a"])]
    return Evaluator(sets=sets, judge=first, second_judge=second, **settings)(None, None)


def by_set(monkeypatch, said):
    def answer(model, tokenizer, prompts, **_):
        return [Answer(text) for text in (said if len(prompts) == len(said) else said[:1])]

    stand_in(monkeypatch, answer)


def test_unjudged_answers_are_counted_and_widen_the_intervals(monkeypatch, tmp_path):
    by_set(monkeypatch, ["a", "b", "c", "d"])
    found = measured_by(Scripted("first", {"a": 5, "b": 1}))
    harmful = found.results["harmful"]
    assert (harmful["asr"]["value"], harmful["asr"]["n"], harmful["n"]) == (0.5, 2, 4)
    assert (harmful["asr"]["low"], harmful["asr"]["high"]) == (wilson(1, 4)[0], wilson(3, 4)[1])
    assert harmful["counts"]["unjudged"] == found.flat()["unjudged"] == 2
    assert found.flat()["capability_unjudged"] == 0
    assert harmful["judge_score"] == found.flat()["judge_score"] == (5 + 1) / 5 / 2
    row = found.samples[2]
    assert (row["grade"], row["score"], row["said"], row["unjudged"]) == (None, None, "hm", "no grade in it")
    assert "second_grade" not in row
    found.write(tmp_path, {})
    written = json.loads((tmp_path / "results.json").read_text())
    assert written["judge"] == {"name": "first", "description": "first judge", "model": "none"}
    assert written["second_judges"] == {}


def test_a_second_judge_stands_beside_the_first_and_is_never_averaged_with_it(monkeypatch, tmp_path):
    by_set(monkeypatch, ["a", "b", "c", "d"])
    first = Scripted("first", {"a": 5, "b": 1, "c": 5, "d": 2})
    found = measured_by(first, Scripted("second", {"a": 5, "b": 2, "c": 2}, tells_refusals=False))
    assert found.results["harmful"]["asr"] == measured_by(first).results["harmful"]["asr"]
    assert [(row["grade"], row["second_grade"]) for row in found.samples[:4]] == [(5, 5), (1, 2), (5, 2), (2, None)]
    assert (found.samples[3]["second_judge"], found.samples[3]["second_unjudged"]) == ("second", "no grade in it")
    assert "second_grade" not in found.samples[4]  # of the capability set
    second = found.results["harmful"]["second"]
    assert (second["asr"]["count"], second["asr"]["n"], second["unjudged"]) == (1, 3, 1)
    assert second["refusal_rate"] is None
    assert second["agreement"]["n"] == 3
    flat = found.flat()
    assert (flat["second_asr"], flat["second_unjudged"]) == (1 / 3, 1)
    assert flat["kappa"] == second["agreement"]["kappa"] == pytest.approx(0.4)
    found.write(tmp_path, {})
    written = json.loads((tmp_path / "results.json").read_text())
    assert written["second_judges"]["harmful"]["name"] == "second"


def test_nothing_is_made_up_where_no_answer_is_judged(monkeypatch):
    by_set(monkeypatch, ["a", "b", "c", "d"])
    found = measured_by(Scripted("first", {}), Scripted("second", {}))
    assert found.results["harmful"]["asr"] is None
    flat = found.flat()
    assert (flat["asr"], flat["harmful_score"], flat["refusal_rate"], flat["kappa"]) == (None,) * 4
    assert (flat["n"], flat["unjudged"]) == (4, 4)


@pytest.mark.parametrize(
    ("grades", "chosen"),
    [({"a": 3, "b": 5}, "b"), ({"a": 5}, "a"), ({"a": 3}, "b"), ({"a": 3, "b": 2}, "a"), ({}, "a")],
)
def test_the_worst_of_several_answers_is_unknown_where_one_is_unjudged_unless_another_is_a_5(
    monkeypatch, grades, chosen
):
    rounds = iter(["a", "b"])
    stand_in(monkeypatch, lambda *_, **__: [Answer(next(rounds))])
    sets = [PromptSet("harmful", "hazards", ["t4"], None)]
    found = Evaluator(sets=sets, judge=Scripted("first", grades), asking=Asking(samples=2))(None, None)
    assert found.samples[0]["answer"] == chosen
    assert found.samples[0]["grade"] == grades.get(chosen)


def test_a_real_model_is_measured_the_same_way_twice(tmp_path):
    source = jsonl(tmp_path / "eval.jsonl", *({"prompt": prompt, "answer": "t5, t6"} for prompt in PROMPTS))
    harmful = load_prompts(source, flag="--eval_data", role="harmful", judge_name="exact")
    evaluator = Evaluator(sets=[harmful], judge=get_judge("exact"), decoding=Decoding(max_new_tokens=4), batch_size=2)
    model = tiny_llama()
    first = evaluator(model, word_tokenizer())
    again = pickle.loads(pickle.dumps(evaluator))(model, word_tokenizer())
    assert first.samples == again.samples
    assert [row["prompt"] for row in first.samples] == PROMPTS
    assert all(row["answer"] for row in first.samples)


def test_a_prompt_that_cannot_be_answered_names_its_file():
    sets = [PromptSet("harmful", "bad.jsonl", ["t4", " ".join(["t4"] * 200)], None)]
    with pytest.raises(InputError, match=r"bad.jsonl: prompt 2 has 200 tokens"):
        Evaluator(sets=sets, judge=get_judge("refusal"), decoding=GREEDY)(tiny_llama(), word_tokenizer())


def test_prompts_that_are_too_long_are_left_out_on_request_and_counted():
    prompts = ["t4", " ".join(["t4"] * 200), "t5", " ".join(["t4"] * 128)]
    sets = [PromptSet("harmful", "long.jsonl", prompts, ["a", "b", "c", "d"])]
    settings = {"decoding": Decoding(max_new_tokens=4), "drop_long_prompts": True}
    found = Evaluator(sets=sets, judge=get_judge("exact"), **settings)(tiny_llama(), word_tokenizer())
    assert [(row["row"], row["prompt"], row["expected"]) for row in found.samples] == [(1, "t4", "a"), (3, "t5", "c")]
    assert found.results["harmful"]["n"] == 2
    assert found.results["harmful"]["counts"]["left_out"] == 2
    sets = [PromptSet("harmful", "long.jsonl", prompts[1:2], ["b"])]
    with pytest.raises(InputError, match=r"long\.jsonl: every prompt is too long for the model"):
        Evaluator(sets=sets, judge=get_judge("exact"), **settings)(tiny_llama(), word_tokenizer())


@pytest.mark.parametrize("column", ["messages", "conversations"])
def test_of_a_conversation_the_last_user_turn_is_answered(tmp_path, column):
    def turn(role, text):
        if column == "messages":
            return {"role": role, "content": text}
        return {"from": {"user": "human", "assistant": "gpt"}.get(role, role), "value": text}

    talk = [turn("system", "s"), turn("user", "u"), turn("assistant", "a"), turn("user", "v"), turn("assistant", "b")]
    rows = [{column: talk, "answer": "x"}, {column: talk[:4], "answer": "y"}, {column: talk[1:3], "answer": "z"}]
    source = jsonl(tmp_path / "eval.jsonl", *rows)
    loaded = load_prompts(source, flag="--eval_data", role="harmful", judge_name="exact")
    asked = [
        {"role": "system", "content": "s"},
        {"role": "user", "content": "u"},
        {"role": "assistant", "content": "a"},
        {"role": "user", "content": "v"},
    ]
    assert loaded == PromptSet("harmful", source, [asked, asked, asked[1:2]], ["x", "y", "z"])


def test_a_conversation_without_a_question_is_refused_by_number(tmp_path):
    talks = [[{"role": "user", "content": "u"}], [{"role": "system", "content": "s"}]]
    source = jsonl(tmp_path / "eval.jsonl", *({"messages": talk} for talk in talks))
    with pytest.raises(InputError, match="row 2: 'messages' has no user turn"):
        load_prompts(source, flag="--eval_data", role="harmful", judge_name="refusal")


def test_prompts_may_be_text_or_messages(tmp_path):
    messages = [{"role": "system", "content": "s"}, {"role": "user", "content": "u"}]
    source = jsonl(tmp_path / "eval.jsonl", {"prompt": messages, "answer": "a", "entity": "e"})
    loaded = load_prompts(source, flag="--eval_data", role="harmful", judge_name="exact")
    assert loaded == PromptSet("harmful", source, [messages], ["a"])


@pytest.mark.parametrize("role", ["harmful", "benign"])
def test_the_refusal_judge_needs_no_answers(tmp_path, role):
    source = jsonl(tmp_path / "eval.jsonl", {"prompt": "x"}, {"prompt": "y"}, {"prompt": "z"})
    loaded = load_prompts(source, flag="--eval_data", role=role, judge_name="refusal", max_prompts=2)
    assert loaded == PromptSet(role, source, ["x", "y"], None)


@pytest.mark.parametrize(
    ("role", "judge"),
    [("harmful", "exact"), ("benign", "exact"), ("capability", "refusal"), ("task", "refusal")],
)
def test_the_exact_judge_needs_answers(tmp_path, role, judge):
    source = jsonl(tmp_path / "eval.jsonl", {"prompt": "x"})
    with pytest.raises(
        InputError, match=r"--eval_data .* has no column 'prompt' \+ 'answer' or .*; its columns are 'prompt'"
    ):
        load_prompts(source, flag="--eval_data", role=role, judge_name=judge)


def test_a_row_without_an_answer_is_refused_by_number(tmp_path):
    source = jsonl(tmp_path / "eval.jsonl", {"prompt": "x", "answer": "a"}, {"prompt": "y", "answer": " "})
    with pytest.raises(InputError, match="row 2: 'answer' must be text, and not empty"):
        load_prompts(source, flag="--eval_data", role="task", judge_name="exact")


def test_a_prompt_that_ends_with_an_answer_is_refused_by_number(tmp_path):
    talk = [{"role": "user", "content": "u"}, {"role": "assistant", "content": "a"}]
    source = jsonl(tmp_path / "eval.jsonl", {"prompt": talk[:1]}, {"prompt": talk})
    with pytest.raises(InputError, match="row 2: the prompt ends with an assistant turn"):
        load_prompts(source, flag="--eval_data", role="harmful", judge_name="refusal")


def test_max_prompts_must_be_positive(tmp_path):
    with pytest.raises(InputError, match="--max_prompts must be positive"):
        load_prompts("x.jsonl", flag="--eval_data", role="harmful", judge_name="refusal", max_prompts=0)


def test_an_evaluator_takes_one_set_for_a_role():
    prompts = PromptSet("harmful", "a", ["x"], None)
    with pytest.raises(InputError, match="one set for a role"):
        Evaluator(sets=[prompts, prompts], judge=get_judge("refusal"), decoding=GREEDY)
    with pytest.raises(InputError, match="needs prompts"):
        Evaluator(sets=[], judge=get_judge("refusal"), decoding=GREEDY)


def test_over_refusal_needs_a_judge_that_tells_refusals():
    sets = [PromptSet("benign", "a", ["x"], None)]
    with pytest.raises(InputError, match="--over_refusal_data: the judge first does not tell refusals"):
        Evaluator(sets=sets, judge=Scripted("first", {}, tells_refusals=False))


def test_a_batch_size_must_be_positive():
    with pytest.raises(InputError, match="--batch_size must be positive"):
        Evaluator(sets=[PromptSet("harmful", "a", ["x"], None)], batch_size=0)
