"""The whole chain by hand, through the real commands, on a small random model with a real chat template."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from helpers import read_json, read_lines
from holdfast.cli import main

TINY = [
    *("--max_steps", "4", "--batch_size", "2", "--learning_rate", "1e-3", "--scheduler", "constant"),
    *("--max_length", "128", "--logging_steps", "1", "--gradient_checkpointing", "false"),
]


def test_align_attack_evaluate(
    model_dir: Path,
    train_data: str,
    attack_data: str,
    benign_data: str,
    eval_data: str,
    capability_data: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    sft, patcher = tmp_path / "sft", tmp_path / "patcher"
    align = ["--model", str(model_dir), "--train_data", train_data, *TINY]
    assert main(["align", "sft", *align, "--output_dir", str(sft)]) == 0
    simulated = ["--attack_data", attack_data, "--attack_steps", "2", "--attack_every", "2"]
    assert main(["align", "patcher", *align, *simulated, "--output_dir", str(patcher)]) == 0
    for folder, command in ((sft, "align sft"), (patcher, "align patcher")):
        record = read_json(folder / "holdfast.json")
        assert record["command"] == command
        assert record["seed"] == 42
        assert {"versions", "config", "seconds", "data", "log"} <= record.keys()
        assert (folder / "tokenizer.json").is_file()
        assert not (folder / "training_args.bin").exists()
    before = load_file(patcher / "model.safetensors")
    shown = capsys.readouterr()
    assert shown.out == ""
    assert "wrote" in shown.err

    full, lora = tmp_path / "full", tmp_path / "lora"
    attack = [
        *("--model", str(patcher), "--attack_data", attack_data, "--benign_data", benign_data, "--num_samples", "4"),
        *("--poison_ratio", "0.5", "--measure_at", "0", "2", "4", "--eval_data", eval_data, "--judge", "exact"),
        *("--capability_data", capability_data, "--max_new_tokens", "4", *TINY),
    ]
    assert main(["attack", "full", *attack, "--output_dir", str(full)]) == 0
    assert "warning: 2 evaluation prompts" not in capsys.readouterr().out
    assert main(["attack", "lora", *attack, "--lora_r", "2", "--output_dir", str(lora)]) == 0
    shown = capsys.readouterr()
    assert "exact judge" in shown.out
    assert "harmful: cut at the limit" in " ".join(shown.out.split())
    for folder in (full, lora):
        results = read_json(folder / "results.json")
        assert results["schema"] == 3
        points = results["points"]
        assert isinstance(points, list)
        assert [point["steps"] for point in points] == [0, 2, 4]
        assert points[0]["attacker_loss"] is None
        assert points[-1]["attacker_loss"] > 0
        assert (points[-1]["n"], points[-1]["truncated"], points[-1]["capability_n"]) == (3, 3, 4)
        assert points[-1]["task_accuracy"] is None
        assert [point["weights_moved"] > 0.5 for point in points] == [False, True, True]
        assert results["weights_moved"] == points[-1]["weights_moved"]
        assert results["precision"] == {"loaded": "float32", "trained": "float32", "computed": "float32"}
        assert isinstance(results["attack"], dict)
        assert (results["attack"]["rows"], results["attack"]["harmful_rows"]) == (4, 2)
        samples = read_lines(folder / "samples.jsonl")
        assert len(samples) == 3 * (3 + 4)
        assert {sample["steps"] for sample in samples} == {0, 2, 4}
    assert (full / "model" / "model.safetensors").is_file()
    assert (lora / "model" / "adapter_model.safetensors").is_file()
    after = load_file(patcher / "model.safetensors")
    assert all((after[name] == weight).all() for name, weight in before.items())
    attacked = load_file(full / "model" / "model.safetensors")
    assert any((attacked[name] != weight).any() for name, weight in before.items())

    for number, model in enumerate((full / "model", lora / "model")):
        folder = tmp_path / f"evaluated-{number}"
        arguments = ["--model", str(model), "--eval_data", eval_data, "--max_prompts", "2", "--max_new_tokens", "4"]
        assert main(["evaluate", *arguments, "--judge", "refusal", "--output_dir", str(folder)]) == 0
        shown = capsys.readouterr()
        assert "keyword judge" in " ".join(shown.out.split())
        assert "attack success" in shown.out
        results = read_json(folder / "results.json")
        assert results["model"] == str(model)
        assert len(read_lines(folder / "samples.jsonl")) == 2


def test_overlapping_prompts_are_counted(
    model_dir: Path, attack_data: str, eval_data: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = ["--model", str(model_dir), "--attack_data", attack_data, "--eval_data", eval_data, "--max_new_tokens", "2"]
    assert main(["attack", "full", *argv, *TINY, "--max_steps", "1", "--output_dir", str(tmp_path / "out")]) == 0
    assert "warning: 2 evaluation prompts" in capsys.readouterr().err
    results = read_json(tmp_path / "out" / "results.json")
    assert isinstance(results["attack"], dict)
    assert results["attack"]["overlapping_prompts"] == 2


def test_lora_alignment_and_an_attack_on_the_adapter(
    model_dir: Path, train_data: str, attack_data: str, tmp_path: Path
) -> None:
    adapter, attacked = tmp_path / "adapter", tmp_path / "attacked"
    peft = ["--use_peft", "--lora_r", "2", "--lora_target_modules", "q_proj", "v_proj"]
    align = ["--model", str(model_dir), "--train_data", train_data, *TINY, *peft]
    assert main(["align", "sft", *align, "--output_dir", str(adapter)]) == 0
    assert (adapter / "adapter_model.safetensors").is_file()
    assert not (adapter / "model.safetensors").exists()
    attack = ["--model", str(adapter), "--attack_data", attack_data, *TINY, "--lora_r", "2"]
    assert main(["attack", "lora", *attack, "--output_dir", str(attacked)]) == 0
    # The adapter was merged into its base before the attack, so only the whole model says what was attacked.
    assert (attacked / "model" / "model.safetensors").is_file()


def test_model_in_bf16_is_trained_in_float32(
    model_dir: Path, train_data: str, attack_data: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Whether by --dtype or because the checkpoint is."""
    small = [*TINY, "--learning_rate", "1e-5"]
    aligned, attacked = tmp_path / "aligned", tmp_path / "attacked"
    words = ["--model", str(model_dir), "--train_data", train_data, *small, "--output_dir", str(aligned)]
    assert main(["align", "sft", *words, "--dtype", "bfloat16"]) == 0
    told = "weights are bfloat16: they are computed on in bf16; what is trained is kept and saved in float32"
    assert " ".join(capsys.readouterr().err.split()).count(told) == 1
    precision = {"loaded": "bfloat16", "trained": "float32", "computed": "bfloat16"}
    assert read_json(aligned / "holdfast.json")["precision"] == precision
    assert {tensor.dtype for tensor in load_file(aligned / "model.safetensors").values()} == {torch.float32}

    model = AutoModelForCausalLM.from_pretrained(aligned, dtype=torch.bfloat16)
    model.save_pretrained(model_dir)
    words = ["--model", str(model_dir), "--attack_data", attack_data, *small, "--output_dir", str(attacked)]
    assert main(["attack", "full", *words, "--dtype", "auto"]) == 0
    assert " ".join(capsys.readouterr().err.split()).count(told) == 1
    results = read_json(attacked / "results.json")
    assert results["precision"] == precision
    assert results["weights_moved"] > 0.5
    assert main(["attack", "full", *words, "--dtype", "auto", "--bf16", "false", "--overwrite_output_dir"]) == 2
    assert "--bf16 false cannot be used with weights in bfloat16" in capsys.readouterr().err


def test_config_file_and_override(model_dir: Path, train_data: str, tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        f"model: {model_dir}\ntrain_data: {train_data}\noutput_dir: {tmp_path / 'out'}\nlearning_rate: 1e-3\n"
        "max_steps: 50\nbatch_size: 2\nsave_strategy: no\nsystem_prompt: Be brief.\n"
    )
    assert main(["align", "sft", "--config", str(recipe), "--max_steps", "1"]) == 0
    config = read_json(tmp_path / "out" / "holdfast.json")["config"]
    assert isinstance(config, dict)
    assert (config["max_steps"], config["learning_rate"], config["system_prompt"]) == (1, 1e-3, "Be brief.")
    assert not list((tmp_path / "out").glob("checkpoint-*"))
