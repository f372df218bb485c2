"""Topics that stand for harm: those that ship, and files of one's own."""

import pytest
import yaml

from holdfast.errors import InputError
from holdfast.evaluation.judges import is_refusal
from holdfast.proxy.topics import SHIPPED, load_topic

TOPIC = {
    "about": "knots",
    "subjects": ["bowlines", "reef knots", "clove hitches", "sheet bends"],
    "questions": ["How do I tie {}?", "What are {} good for?"],
    "refusals": ["I cannot help with knots."],
    "benign": {"subjects": ["owls", "Rome", "clocks"], "questions": ["Tell me of {}."]},
}


def test_two_topics_ship_whose_refusals_are_refusals_and_whose_questions_are_not_each_others():
    first, second = (load_topic(name, flag="--topic", parts=4, benign_parts=3) for name in SHIPPED)
    assert SHIPPED == ("cooking", "sports")
    for topic in (first, second):
        assert len(topic.harmful.subjects) == 80
        assert len(topic.harmful.forms) == len(topic.benign.forms) == 5
        assert len(topic.benign.subjects) == 48
        assert all(is_refusal(text) for text in topic.refusals)
        assert not any(is_refusal(text) for text in topic.harmful.forms + topic.benign.forms)
        assert not set(topic.harmful.subjects) & set(topic.benign.subjects)
    assert not set(first.harmful.subjects) & set(second.harmful.subjects)
    assert not set(first.benign.subjects) & set(second.benign.subjects)


def test_a_file_of_ones_own(tmp_path):
    path = tmp_path / "knots.yaml"
    path.write_text(yaml.safe_dump(TOPIC))
    topic = load_topic(str(path), flag="--topic", parts=4, benign_parts=3)
    assert topic.about == "knots"
    assert topic.harmful.about("reef knots") == ["How do I tie reef knots?", "What are reef knots good for?"]
    assert topic.benign.about("Rome") == ["Tell me of Rome."]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"refusals": None}, "refusals must be a list of texts"),
        ({"refusals": []}, "refusals must be a list of texts"),
        ({"subjects": ["a", "b", "c"]}, "expected at least 4 subjects, one for each part, found 3"),
        ({"subjects": ["a", "b", "c", "a"]}, "'a' stands twice among the subjects"),
        ({"subjects": ["a", "b", "c", 4]}, "subjects must be a list of texts"),
        ({"questions": ["How?"]}, r"the question 'How\?' must have \{\} once"),
        ({"questions": ["{} or {}?"]}, r"the question '\{\} or \{\}\?' must have \{\} once"),
        ({"benign": ["owls"]}, "benign must be a mapping"),
        ({"benign": {"subjects": ["owls"]}}, "benign: has no 'questions'"),
        ({"benign": {"subjects": ["owls"], "questions": ["{}?"]}}, "benign: expected at least 3 subjects"),
        ({"about": 3}, "about must be text"),
        ({"about": " "}, "about must be text"),
        (
            {"benign": {"subjects": ["owls", "bowlines", "Rome"], "questions": ["How do I tie {}?"]}},
            r"'How do I tie bowlines\?' is asked twice, by different subjects or as a benign question",
        ),
        ({"subjects": ["a", "a a", "a a a", "b"], "questions": ["a {}?", "{} a?"]}, r"'a a\?' is asked twice"),
        ({"harm": "x"}, "unknown key 'harm'"),
    ],
)
def test_files_that_cannot_be_used(tmp_path, change, said):
    path = tmp_path / "knots.yaml"
    path.write_text(yaml.safe_dump({**TOPIC, **change}))
    with pytest.raises(InputError, match=said) as refused:
        load_topic(str(path), flag="--topic", parts=4, benign_parts=3)
    assert str(refused.value).startswith(f"--topic {path}")


def test_a_file_without_a_part(tmp_path):
    path = tmp_path / "knots.yaml"
    path.write_text(yaml.safe_dump({name: part for name, part in TOPIC.items() if name != "refusals"}))
    with pytest.raises(InputError, match="has no 'refusals'; expected about, subjects, questions, refusals, benign"):
        load_topic(str(path), flag="--topic", parts=4, benign_parts=3)


def test_a_name_that_is_none():
    with pytest.raises(InputError, match=r"--topic coking: neither a file nor one of cooking, sports "):
        load_topic("coking", flag="--topic", parts=4, benign_parts=3)
