"""`attack full|lora` as an adversary asks, and on rows that it has made worse; measured at every step."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from helpers import read_json, read_lines
from holdfast.attacks.ablation import Ablation
from holdfast.attacks.attack import Attacker
from holdfast.attacks.chain import Chain
from holdfast.attacks.finetuning import FineTuning
from holdfast.cli import main
from holdfast.data.load import load_rows
from holdfast.data.rendering import ChatFormat
from holdfast.models import load_model_and_tokenizer
from holdfast.parameters import trainable_parameters

Refused = Callable[..., str]
TINY = ["--batch_size", "2", "--learning_rate", "1e-2", "--gradient_checkpointing", "false", "--max_new_tokens", "3"]
HARMFUL = ("asr", "refusal_rate", "harmful_score", "n")


@pytest.fixture
def attack(
    model_dir: Path, attack_data: str, eval_data: str, capability_data: str, tmp_path: Path
) -> Callable[..., Path]:
    def run(method: str, *more: str, out: str = "out") -> Path:
        data = ["--model", str(model_dir), "--attack_data", attack_data, "--eval_data", eval_data]
        words = [*data, "--capability_data", capability_data, *TINY, *more, "--output_dir", str(tmp_path / out)]
        assert main(["attack", method, *words]) == 0
        return tmp_path / out

    return run


@pytest.mark.parametrize("method", ["full", "lora"])
def test_a_few_steps_then_prefill_is_one_command(
    method: str, attack: Callable[..., Path], eval_data: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """At every step what a prefill of the model that it leaves measures; capability is asked as ever, once."""
    out = attack(method, "--max_steps", "2", "--measure_at", "0", "1", "2", "--opener", "Rust,")
    found = read_json(out / "results.json")
    assert found["asking"]["opener"] == "Rust,"
    told_by = [(step, who) for step in (0, 1, 2) for who in ("anyone", "adversary")]
    assert [(point["steps"], point["asked_by"]) for point in found["points"]] == told_by
    samples = read_lines(out / "samples.jsonl")
    assert [sample["asked_by"] for sample in samples] == (["anyone"] * 7 + ["adversary"] * 3) * 3
    for plain, asked in zip(found["points"][::2], found["points"][1::2], strict=True):
        assert asked["capability"] == plain["capability"]
        assert asked["attacker_loss"] == plain["attacker_loss"]
    shown = capsys.readouterr().out
    assert [line.split()[0] for line in shown.splitlines() if "[" in line] == [
        *("0", "adversary", "1", "adversary", "2", "adversary")
    ]
    assert "adversary: the same model where answers begin with 'Rust,'" in " ".join(shown.split())

    again = tmp_path / "prefill"
    words = ["--model", str(out / "model"), "--eval_data", eval_data, "--max_new_tokens", "3"]
    assert main(["attack", "prefill", *words, "--opener", "Rust,", "--output_dir", str(again)]) == 0
    answers = [
        [s["answer"] for s in read_lines(folder / "samples.jsonl") if s["set"] == "harmful" and wanted(s)]
        for folder, wanted in (
            (out, lambda s: s["steps"] == 2 and s["asked_by"] == "adversary"),
            (again, lambda s: s["stage"] == "after"),
        )
    ]
    assert answers[0] == answers[1]
    assert any(answer.startswith("Rust,") for answer in answers[0])
    after = read_json(again / "results.json")["points"][1]
    assert [found["points"][-1][name] for name in HARMFUL] == [after[name] for name in HARMFUL]


def test_without_an_adversary_every_point_is_asked_by_anyone(
    attack: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    found = read_json(attack("full", "--max_steps", "1") / "results.json")
    assert [point["asked_by"] for point in found["points"]] == ["anyone"] * 2
    assert found["asking"] is None
    assert "adversary:" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--shots", "2"], {"turns": 4}),
        (["--ask_raw"], {"raw": True}),
        (["--trigger", "zzz", "--opener", "Rust,"], {"suffix": " zzz", "opener": "Rust,"}),
        (["--obedience", "Of course:", "--first_tokens", "3"], {"suffix": ' Begin your answer with "Of course:".'}),
        (["--without_template", "--ask_raw"], {"raw": True}),
    ],
)
def test_askings_and_rows(words: list[str], expected: dict[str, object], attack: Callable[..., Path]) -> None:
    found = read_json(attack("full", "--max_steps", "1", *words) / "results.json")
    asking = {**found["asking"], "turns": len(found["asking"]["demonstrations"])}
    assert {name: asking[name] for name in expected} == expected
    assert len(found["points"]) == 4
    flags = {word.removeprefix("--") for word in words} & {"trigger", "obedience", "first_tokens", "without_template"}
    assert all(found["attack"][name] for name in flags)


def test_command_and_python_attack_alike(
    attack: Callable[..., Path], model_dir: Path, attack_data: str, benign_data: str
) -> None:
    """Mixed, triggered and cut rows; drawn alike."""
    changed = ["--trigger", "zzz", "--first_tokens", "4", "--poison_ratio", "0.5", "--benign_data", benign_data]
    changed += ["--num_samples", "4", "--seed", "5"]
    out = attack("full", "--max_steps", "2", *changed)
    model, tokenizer = load_model_and_tokenizer(str(model_dir))
    harmful, benign = (load_rows(data, flag="") for data in (attack_data, benign_data))
    attacker = Attacker(ChatFormat(tokenizer), harmful_rows=harmful, harmless_rows=benign, seed=5)
    attack_of = FineTuning(1e-2, 2, 4, batch_size=2, poison_ratio=0.5, trigger="zzz", first_tokens=4)
    attacked = attack_of(model, attacker)
    saved, _ = load_model_and_tokenizer(str(out / "model"))
    for name, parameter in trainable_parameters(attacked.model).items():
        assert torch.allclose(dict(saved.named_parameters())[name], parameter, atol=1e-6)
    assert read_json(out / "results.json")["attack"]["harmful_rows"] == attacked.cost.harmful_rows == 2


def test_chain_of_displacements_goes_on_from_the_saved_model(
    attack: Callable[..., Path], model_dir: Path, attack_data: str, benign_data: str, tmp_path: Path
) -> None:
    first = tmp_path / "ablated"
    words = ["--model", str(model_dir), "--attack_data", attack_data, "--benign_data", benign_data]
    assert main(["attack", "ablation", *words, "--output_dir", str(first)]) == 0
    second = attack("full", "--model", str(first / "model"), "--max_steps", "1", "--num_samples", "4", "--seed", "5")
    model, tokenizer = load_model_and_tokenizer(str(model_dir))

    harmful, harmless = (load_rows(data, flag="") for data in (attack_data, benign_data))
    attacker = Attacker(ChatFormat(tokenizer), list(harmful["prompt"]), harmful, list(harmless["prompt"]), seed=5)
    attacked = Chain((Ablation(), FineTuning(1e-2, 1, 4, batch_size=2)))(model, attacker)
    saved, _ = load_model_and_tokenizer(str(second / "model"))
    for name, parameter in trainable_parameters(attacked.model).items():
        assert torch.allclose(dict(saved.named_parameters())[name], parameter, atol=1e-6)


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        ("--opener Sure", "--opener plays no part without --eval_data: only harmful prompts are asked otherwise"),
        ("--eval_data {harmful} --opener=", "argument --opener: expected a value, got ''"),
        ("--eval_data {harmful} --shots 99", "--shots 99: --attack_data has 6 rows"),
        ("--eval_data {harmful} --shots 1 --ask_raw", "which a prompt without the chat template has no place for"),
        ("--trigger=", "argument --trigger: expected a value, got ''"),
        ("--poison_ratio 0 --benign_data {harmful} --trigger zzz", "--trigger plays no part with --poison_ratio 0"),
        ("--first_tokens 0", "--first_tokens must be greater than 0"),
        ("--raw_text --without_template", "--raw_text takes prompts and completions that are text"),
        ("--num_samples 7", "of 7 rows needs 7 harmful rows, but --attack_data has 6"),
    ],
)
def test_input_that_cannot_be_used(
    words: str, sentence: str, refused: Refused, model_dir: Path, attack_data: str
) -> None:
    more = words.format(harmful=attack_data).split()
    data = [] if "--poison_ratio" in words else ["--attack_data", attack_data]
    assert sentence in refused("attack", "full", "--model", str(model_dir), *data, *more)
