"""Attacks that train no weight, through the command line: measured before and after, the model on disk untouched."""

import shutil
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file

from helpers import read_json, read_lines
from holdfast.attacks.ablation import Ablation
from holdfast.attacks.attack import Attacker
from holdfast.cli import main
from holdfast.cli.attack import make_parser
from holdfast.cli.suite import SUITE_ATTACKS
from holdfast.data.load import load_rows
from holdfast.data.rendering import ChatFormat
from holdfast.models import load_model_and_tokenizer, merge
from holdfast.parameters import trainable_parameters

Refused = Callable[..., str]
SHORT = ["--max_new_tokens", "3"]


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def weights_of(folder: Path) -> dict[str, torch.Tensor]:
    model, _ = load_model_and_tokenizer(str(folder))
    return {name: parameter.detach() for name, parameter in trainable_parameters(model).items()}


@pytest.fixture
def base(model_dir: Path, tmp_path: Path) -> Path:
    """A model of the same shapes."""
    folder = Path(shutil.copytree(model_dir, tmp_path / "base"))
    model, _ = load_model_and_tokenizer(str(folder))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(0.5)
    model.save_pretrained(folder)
    return folder


@pytest.fixture
def attack(
    model_dir: Path,
    attack_data: str,
    benign_data: str,
    eval_data: str,
    capability_data: str,
    base: Path,
    tmp_path: Path,
) -> Callable[..., Path]:
    """Run an attack with all the data it needs, and return its folder."""
    data = {
        "harmful_prompts": ["--attack_data", attack_data],
        "harmful_rows": ["--attack_data", attack_data],
        "harmless_prompts": ["--benign_data", benign_data],
        "base": ["--base", str(base)],
    }

    def run(method: str, *more: str, model: Path = model_dir) -> Path:
        out = tmp_path / "out"
        needs = [word for need in SUITE_ATTACKS[method].needs for word in data[need]]
        measured = ["--eval_data", eval_data, "--capability_data", capability_data, *SHORT]
        words = ["--model", str(model), *needs, *measured, *more, "--output_dir", str(out)]
        assert main(["attack", method, *words]) == 0
        return out

    return run


@pytest.mark.parametrize("method", SUITE_ATTACKS)
def test_every_attack_is_measured_before_and_after(
    method: str, attack: Callable[..., Path], model_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = content(model_dir)
    more = {"demonstrations": ["--shots", "2"], "best-of-n": ["--n", "2"], "rounding": ["--bits", "3"]}
    more["soft-prompt"] = ["--vectors", "2", "--steps", "2"]
    out = attack(method, *more.get(method, []))
    assert content(model_dir) == before
    found = read_json(out / "results.json")
    assert found["command"] == f"attack {method}"
    assert [point["stage"] for point in found["points"]] == ["before", "after"]
    assert all(point["n"] == 3 and point["capability_n"] == 4 for point in found["points"])
    samples = read_lines(out / "samples.jsonl")
    assert [sample["stage"] for sample in samples] == ["before"] * 7 + ["after"] * 7
    prompts = method in ("prefill", "demonstrations", "soft-prompt", "best-of-n", "raw")
    assert (out / "model").exists() != prompts
    assert (found["weights_moved"] > 0) != prompts
    assert (found["cost"]["forward_passes"] > 0) == (method in ("ablation", "soft-prompt"))
    if method == "soft-prompt":
        assert load_file(out / "soft_prompt.safetensors")["prefix"].shape == (2, 16)
        assert found["asking"]["prefix"] == 2
    if prompts:
        capable = [
            [s["answer"] for s in samples if s["set"] == "capability" and s["stage"] == t] for t in ("before", "after")
        ]
        assert capable[0] == capable[1]
    else:
        moved, origin = weights_of(out / "model"), weights_of(model_dir)
        assert any(not torch.equal(moved[name], origin[name]) for name in origin)
    shown = capsys.readouterr()
    assert f"under attack ({method})" in shown.out
    assert "stage" in shown.out
    assert "loss" not in shown.out


def test_command_and_python_attack_alike(
    attack: Callable[..., Path], model_dir: Path, attack_data: str, benign_data: str
) -> None:
    out = attack("ablation", "--layer", "0", "--mlp_scale", "1.2", "0", "2", "0.4", "--keep_norms")
    model, tokenizer = load_model_and_tokenizer(str(model_dir))
    harmful, harmless = (list(load_rows(data, flag="")["prompt"]) for data in (attack_data, benign_data))
    attacker = Attacker(ChatFormat(tokenizer), harmful, harmless_prompts=harmless)
    attacked = Ablation(layer=0, mlp_scale=[1.2, 0, 2, 0.4], keep_norms=True)(model, attacker)
    saved = weights_of(out / "model")
    assert all(torch.equal(saved[name], p) for name, p in trainable_parameters(attacked.model).items())
    found = read_json(out / "results.json")
    assert found["attack"]["mlp_scale"] == [1.2, 0, 2, 0.4]
    assert found["cost"]["tokens"] == attacked.cost.tokens


def test_attacked_model_answers_as_measured_and_is_attacked_further(
    attack: Callable[..., Path], tmp_path: Path
) -> None:
    """Chains on the command line: the model of one attack is that of the next."""
    out = attack("dropping", "--layer", "0")
    moved = Path(shutil.move(out, tmp_path / "dropped"))
    further = attack("prefill", "--opener", "Rust,", model=moved / "model")
    first, second = (read_json(folder / "results.json") for folder in (moved, further))
    assert first["points"][1] == {**second["points"][0], "stage": "after"}
    answers = [
        s["answer"] for s in read_lines(further / "samples.jsonl") if s["stage"] == "after" and s["set"] == "harmful"
    ]
    assert all(answer == "" or answer.startswith("Rust,") for answer in answers)
    assert any(answers)
    assert second["asking"]["opener"] == "Rust,"


def test_adapter_is_attacked_as_a_whole_model(attack: Callable[..., Path], model_dir: Path, tmp_path: Path) -> None:
    model, tokenizer = load_model_and_tokenizer(str(model_dir))
    adapter = get_peft_model(model, LoraConfig(r=2, target_modules=["o_proj"], init_lora_weights=False))
    adapter.save_pretrained(tmp_path / "adapter")
    tokenizer.save_pretrained(tmp_path / "adapter")
    before = content(tmp_path / "adapter")
    out = attack("dropping", "--amount", "0.5", model=tmp_path / "adapter")
    assert content(tmp_path / "adapter") == before
    saved, whole = load_file(out / "model" / "model.safetensors"), dict(merge(adapter).named_parameters())
    for layer, factor in ((0, 1.0), (1, 0.5)):
        name = f"model.layers.{layer}.self_attn.o_proj.weight"
        assert torch.allclose(saved[name], factor * whole[name])


def test_without_prompts_the_attacked_model_is_still_written(model_dir: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert main(["attack", "rounding", "--model", str(model_dir), "--output_dir", str(out)]) == 0
    found = read_json(out / "results.json")
    assert found["points"] == []
    assert found["judge"] is None
    assert (out / "model" / "model.safetensors").exists()
    assert not (out / "samples.jsonl").exists()


@pytest.mark.parametrize("method", ["ablation", "dropping"])
def test_what_writes_to_the_stream_under_a_name_of_its_own_can_be_named(
    method: str, refused: Refused, unnamed_dir: Path, attack_data: str, train_data: str, tmp_path: Path
) -> None:
    words = ["attack", method, "--model", str(unnamed_dir)]
    words += ["--attack_data", attack_data, "--benign_data", train_data] if method == "ablation" else []
    said = refused(*words)
    assert "no matrix in model.layers.0.temporal_block is known to write to the residual stream" in said
    assert said.endswith("name those that do by a regular expression with --writes")
    out = tmp_path / "out"
    assert main([*words, "--writes", "(linear_out|o_proj|down_proj)$", "--output_dir", str(out)]) == 0
    assert read_json(out / "results.json")["weights_moved"] > 0


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        ("prefill", "attack prefill changes how harmful prompts are asked: give them as --eval_data"),
        ("raw --capability_data {harmful}", "attack raw changes how harmful prompts are asked"),
        ("dropping --amount nan", "--amount must be a finite number, got nan"),
        ("prefill --opener=", "--opener is empty; expected how every answer begins"),
        ("dropping --layer 2", "there is no layer 2: the model has 2 layers, numbered from 0 to 1"),
        ("dropping --writes nothing", "name those that do by a regular expression with --writes"),
        ("dropping --writes (", "--writes '(' is not a regular expression"),
        ("rounding --bits 1", "--bits must lie between 2 and 32, got 1"),
        ("best-of-n --n 1", "--n must be at least 2, got 1"),
        ("base --base {missing}", "--base: model {missing} is neither a folder nor a model on the Hub"),
        (
            "base --base {other}",
            "--base is not what the model was made of: its model.layers.0.mlp.gate_proj.weight has",
        ),
        ("ablation --attack_data {harmful} --benign_data {harmful}", "harmful and harmless prompts leave the same"),
        ("ablation --attack_data {missing} --benign_data {harmful}", "--attack_data"),
        ("demonstrations --attack_data {harmful} --eval_data {harmful} --shots 99", "--shots 99: --attack_data has 6"),
    ],
)
def test_input_that_cannot_be_used(
    words: str, sentence: str, refused: Refused, model_dir: Path, attack_data: str, tmp_path: Path
) -> None:
    other = Path(shutil.copytree(model_dir, tmp_path / "other"))
    _wider(other)
    places: dict[str, Any] = {"missing": tmp_path / "missing", "other": other, "harmful": attack_data}
    method, *more = words.format(**places).split()
    assert sentence.format(**places) in refused("attack", method, "--model", str(model_dir), *more)


def test_model_that_is_read_is_not_written_over(model_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = content(model_dir)
    assert main(["attack", "rounding", "--model", str(model_dir), "--output_dir", str(model_dir / "out")]) == 2
    assert "this run would write into" in capsys.readouterr().err
    assert content(model_dir) == before


def test_finished_attack_is_replaced_only_when_told(
    attack: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    out = attack("rounding", "--bits", "3")
    before = read_json(out / "results.json")
    words = ["--model", str(before["model"]), "--output_dir", str(out)]
    assert main(["attack", "noise", *words]) == 2
    assert "--overwrite_output_dir" in capsys.readouterr().err
    assert read_json(out / "results.json") == before
    assert main(["attack", "noise", *words, "--overwrite_output_dir"]) == 0
    assert not (out / "samples.jsonl").exists()
    assert read_json(out / "results.json")["attack"]["amount"] == 0.1


@pytest.mark.parametrize("method", SUITE_ATTACKS)
def test_help_names_every_knob(method: str) -> None:
    shown = make_parser(method).format_help()
    for knob in fields(SUITE_ATTACKS[method]):
        assert f"--{knob.name} " in shown
    assert " ".join(shown.split()).count("measure it before and after") == 1


def _wider(folder: Path) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig.from_pretrained(folder)
    config.intermediate_size = 48
    LlamaForCausalLM(config).save_pretrained(folder)
