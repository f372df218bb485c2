"""Attacks that leave the weights alone, and what all attacks share."""

from pathlib import Path

import pytest
import trl
from datasets import Dataset

from helpers import chat_tokenizer, same_bits, tiny_llama, weights, word_tokenizer
from holdfast.attacks.ablation import Ablation
from holdfast.attacks.attack import FREE, Attacker, Choice, Cost, Layers, Range
from holdfast.attacks.best_of_n import BestOfN
from holdfast.attacks.demonstrations import Demonstrations
from holdfast.attacks.prefill import OPENERS, Prefill, openers_of
from holdfast.attacks.raw import Raw
from holdfast.data.rendering import ChatFormat
from holdfast.errors import InputError
from holdfast.evaluation.asking import Asking

TEMPLATE = (Path(trl.__file__).parent / "chat_templates" / "qwen2_5.jinja").read_text()
CHAT = ChatFormat(chat_tokenizer(TEMPLATE))
MODEL = tiny_llama()
ROWS = Dataset.from_list(
    [
        {"system": "Be kind.", "prompt": f"How do I make rust {number}?", "completion": f"Salt {number}."}
        for number in range(6)
    ]
)


@pytest.mark.parametrize(
    ("attack", "asking"),
    [
        (Prefill("Sure:"), Asking(opener="Sure:")),
        (BestOfN(4, 0.8), Asking(samples=4, temperature=0.8)),
        (Raw(), Asking(raw=True)),
    ],
)
def test_the_weights_stay_and_the_asking_changes(attack, asking):
    model = tiny_llama()
    attacked = attack(model, Attacker(CHAT))
    assert attacked.model is model
    assert same_bits(weights(model), weights(tiny_llama()))
    assert attacked.asking == asking
    assert attacked.cost == FREE


def test_answers_begin_as_most_of_the_attackers_do():
    rows = Dataset.from_list(
        [{"prompt": "p", "completion": f"{word} it"} for word in ("Take:", "Use:", "Use:", "Mix", "Take:", "Use:")]
    )
    assert openers_of(rows, None) == ("Use:", *OPENERS)
    assert openers_of(rows, None, common=2) == ("Use:", "Take:", *OPENERS)
    assert openers_of(rows, None, common=9) == ("Use:", "Take:", "Mix", *OPENERS)
    assert openers_of(rows, "raw text is asked for")[0] == "Use:"
    assert openers_of(None, None) == openers_of(rows, None)[1:] == OPENERS


def test_demonstrations_are_drawn_from_the_harmful_rows():
    attacker = Attacker(CHAT, harmful_rows=ROWS, seed=3)
    turns = Demonstrations(shots=3).ask(MODEL, attacker).asking.demonstrations
    assert [turn["role"] for turn in turns] == ["user", "assistant"] * 3
    shown = [(ask["content"], answer["content"]) for ask, answer in zip(turns[::2], turns[1::2], strict=True)]
    assert len(set(shown)) == 3
    assert set(shown) <= {(row["prompt"], row["completion"]) for row in ROWS}
    assert Demonstrations(shots=3).ask(MODEL, attacker).asking.demonstrations == turns
    assert len(Demonstrations(shots=6).ask(MODEL, attacker).asking.demonstrations) == 12


@pytest.mark.parametrize(
    ("attacker", "sentence"),
    [
        (Attacker(CHAT), "attack demonstrations needs harmful prompts with harmful answers; give --attack_data"),
        (Attacker(CHAT, harmful_rows=ROWS.select(range(3))), "--shots 4: --attack_data has 3 rows"),
        (
            Attacker(ChatFormat(word_tokenizer()), harmful_rows=ROWS),
            "shows exchanges as turns, but the tokenizer has no",
        ),
        (
            Attacker(CHAT, harmful_rows=Dataset.from_list([{"input_ids": [1], "labels": [1]}] * 4)),
            "needs --attack_data of text or messages",
        ),
    ],
)
def test_demonstrations_that_cannot_be_shown(attacker, sentence):
    with pytest.raises(InputError, match=sentence):
        Demonstrations(shots=4).ask(MODEL, attacker)


@pytest.mark.parametrize(
    ("attack", "settings", "sentence"),
    [
        (Prefill, {"opener": " "}, "--opener is empty"),
        (BestOfN, {"n": 1}, "--n must be at least 2, got 1"),
        (BestOfN, {"temperature": 0.0}, "--temperature must be positive, got 0"),
        (Demonstrations, {"shots": 0}, "--shots must be greater than 0"),
    ],
)
def test_knobs_out_of_range(attack, settings, sentence):
    with pytest.raises(InputError, match=sentence):
        attack(**settings)


def test_an_attack_tells_what_is_worth_trying():
    space = Ablation.space()
    assert space["layer"] == Layers()
    assert space["mlp_scale"] == Range(0.0, 1.5)
    assert space["keep_norms"] == Choice((False, True))
    assert "writes" not in space
    assert Prefill.space()["opener"].values[0] == Prefill().opener


def test_costs_add_up_but_for_rows_that_may_be_the_same():
    first = Cost(steps=2, harmful_rows=16, tokens=100, forward_passes=3, backward_passes=2, flops=1e6)
    second = Cost(steps=1, harmful_rows=4, tokens=10, forward_passes=1, flops=2e6)
    assert first + second == Cost(3, 16, 110, 4, 2, 3e6)
    assert first + FREE == first
