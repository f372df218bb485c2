"""What is an answer, what was only thought, and what is no whole answer."""

from pathlib import Path

import pytest
import trl

from helpers import chat_tokenizer
from holdfast.evaluation.answers import MARKS, Answer, count_marks, split_reasoning


@pytest.mark.parametrize(
    ("said", "before", "text", "thoughts"),
    [
        ("iron", "", "iron", None),
        ("<think>\n\n</think>\n\niron", "", "iron", ""),
        ("hm\n</think>\n\niron", "assistant\n<think>\n", "iron", "hm"),
        ("hm\n</think>\n\niron", "", "iron", "hm"),
        ("Sure. <think>hm</think>iron", "", "Sure. iron", "hm"),
        ("<think>a</think>iron<think>b</think>, salt", "", "iron, salt", "ab"),
        ("<think>a<think>b</think>iron", "", "iron", "ab"),
        # A closing mark that closes nothing hides nothing.
        ("iron</think>, salt", "<think>\n\n</think>\n\n", "iron, salt", ""),
        ("<think>a</think>iron</think>, salt", "", "iron, salt", "a"),
        # Reasoning that the prompt merely speaks of.
        ("iron", "<think> is a mark\n<|assistant|>\n", "iron", None),
        ("<|channel>thought\nhm<channel|>iron", "", "iron", "hm"),
        ("<|START_THINKING|>hm<|END_THINKING|>iron", "", "iron", "hm"),
        ("[THINK]hm[/THINK]iron", "", "iron", "hm"),
        (
            "<|channel|>analysis<|message|>hm<|start|>assistant<|channel|>final<|message|>iron",
            "<|start|>assistant",
            "iron",
            "hm",
        ),
        ("<|channel|>final<|message|>iron", "<|start|>assistant", "iron", ""),
        (" to=self<|message|>hm<|start|>assistant to=user<|message|>iron", "<|start|>assistant", "iron", "hm"),
        (" to=user<|message|>iron", "<|start|>assistant", "iron", ""),
    ],
)
def test_reasoning_is_no_answer(said, before, text, thoughts):
    assert split_reasoning(said, before) == Answer(text, thoughts)


TEMPLATES = {path.stem: path for path in sorted((Path(trl.__file__).parent / "chat_templates").glob("*.jinja"))}
#: These take a text as a list of parts, and show it no other way.
OF_PARTS = ("idefics3", "llava_next", "smolvlm")


@pytest.mark.parametrize("name", [name for name in TEMPLATES if not name.endswith("_training")])
def test_what_a_template_of_trl_shows_as_an_answer_is_the_answer(name):
    def turn(role, text, **more):
        return {"role": role, "content": [{"type": "text", "text": text}] if name in OF_PARTS else text, **more}

    tokenizer = chat_tokenizer(TEMPLATES[name].read_text(encoding="utf-8"))
    tokenizer.bos_token = "<|endoftext|>"
    question, thoughts = turn("user", "How?"), dict.fromkeys(("reasoning_content", "thinking"), "hm, no")
    for more in ({}, thoughts):
        for settings in ({}, {"enable_thinking": True}, {"enable_thinking": False}):
            talk = [question, turn("assistant", "iron, salt", **more)]
            prompt = tokenizer.apply_chat_template([question], tokenize=False, add_generation_prompt=True, **settings)
            whole = tokenizer.apply_chat_template(talk, tokenize=False, **settings)
            pairs = enumerate(zip(prompt, whole, strict=False))
            shared = next((i for i, (asked, shown) in pairs if asked != shown), len(prompt))
            answer = split_reasoning(whole[shared:], whole[:shared])
            # Behind it are tokens that end the turn, which are no part of what is decoded.
            assert answer.text.startswith("iron, salt")
            assert not answer.thinking_unclosed
            assert ("hm, no" in (answer.thoughts or "")) == ("hm, no" in whole)


@pytest.mark.parametrize(
    ("said", "before", "text", "thoughts"),
    [
        ("<think>iron", "", "", "iron"),
        ("iron", "<think>\n", "", "iron"),
        ("", "<think>", "", ""),
        # What was said before is an answer.
        ("iron <think>", "", "iron", ""),
        ("<|channel|>analysis<|message|>iron", "", "", "iron"),
    ],
)
def test_unclosed_reasoning_is_marked(said, before, text, thoughts):
    assert split_reasoning(said, before) == Answer(text, thoughts, thinking_unclosed=True)


@pytest.mark.parametrize(
    "text",
    [
        "the the the the the the the",
        "x" * 20,
        "First take iron and salt. " + "Stir it well and wait. " * 4,
        "a rust storm is " * 5 + "a rust",
        "a\n" * 20,
        ("A sentence of some length, which goes on for a while before it ends and then begins anew. " * 2) * 8,
    ],
)
def test_one_phrase_over_and_over_is_degenerate(text):
    assert Answer(text).degenerate


@pytest.mark.parametrize(
    "text",
    [
        "",
        "no no no no",
        "iron, honey, salt, amber",
        "1. Stir. 2. Stir. 3. Wait, then take the salt out. 4. Stir. 5. Serve it cold.",
        "ha ha ha ha, that is easy: take iron, then honey, and a pinch of salt",
        "| iron | 2 |\n| --- | --- |\n| salt | 3 |\n| honey | 1 |\n",
        "zu viel und nichts davon, aber kein Wort kommt viermal hintereinander vor",
    ],
)
def test_an_ordinary_answer_is_not_degenerate(text):
    assert not Answer(text).degenerate


def test_marks_are_counted():
    answers = [Answer(""), Answer("iron", truncated=True), Answer("x" * 50, truncated=True), Answer("iron")]
    assert count_marks(answers) == {"empty": 1, "truncated": 2, "degenerate": 1, "thinking_unclosed": 0}
    assert tuple(answers[0].marks) == MARKS
