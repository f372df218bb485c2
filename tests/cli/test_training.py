"""`align` and `finetune` with every method, from end to end on a small folder; adapters go on; runs are resumed."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from datasets import Dataset
from safetensors.torch import load_file

from helpers import read_json, read_lines, same_bits
from holdfast.alignment.presets import PRESETS
from holdfast.cli import main
from holdfast.data.rendering import ChatFormat

TINY = [
    *("--max_steps", "3", "--batch_size", "2", "--learning_rate", "1e-3", "--scheduler", "constant"),
    *("--max_length", "128", "--logging_steps", "1", "--gradient_checkpointing", "false", "--save_strategy", "no"),
]


@pytest.fixture
def trained(model_dir: Path, tmp_path: Path) -> Callable[..., Path]:
    """Train with a method; returns the output folder, whose common files have been looked at."""

    def run(command: str, *words: str, model: Path = model_dir, tiny: tuple[str, ...] = ()) -> Path:
        out = tmp_path / f"out-{len(list(tmp_path.glob('out-*')))}"
        argv = [*command.split(), "--model", str(model), *words, *TINY, *tiny, "--output_dir", str(out)]
        assert main(argv) == 0
        record = read_json(out / "holdfast.json")
        assert (record["command"], record["model"]) == (command, str(model))
        assert record["log"]["loss"] > 0
        assert (out / "tokenizer.json").is_file()
        assert not list(out.glob("*.bin"))
        return out

    return run


@pytest.mark.parametrize(
    ("command", "second", "words", "logged"),
    [
        ("align vaccine", None, ["--rho", "0.5"], {"safe_loss", "perturbation_gap"}),
        ("align booster", "attack_data", ["--lam", "2.5"], {"harmful_loss", "harmful_gain"}),
        ("align antibody", "attack_data", ["--refusal", "No."], {"harmful_gain", "refusal_loss", "flatness_weight"}),
        ("finetune sft", None, ["--seed", "7"], {"grad_norm"}),
        ("finetune lisa", "safety_data", ["--user_steps", "1", "--safety_steps", "1"], {"safety_loss", "user_loss"}),
        ("finetune spard", "safety_data", ["--tau", "0.5"], {"safety_loss", "projection_step"}),
        ("finetune spard", "safety_data", ["--tau", "0.5", "--safety_selection", "random"], {"projection_step"}),
        ("finetune spard", "safety_data", ["--projection", "adamw", "--safety_selection", "all"], {"projection_step"}),
        ("finetune antibody", None, ["--tau", "0.5"], {"refusal_margin", "largest_weight"}),
    ],
)
def test_every_method(
    trained: Callable[..., Path],
    model_dir: Path,
    train_data: str,
    attack_data: str,
    command: str,
    second: str | None,
    words: list[str],
    logged: set[str],
    capsys: pytest.CaptureFixture[str],
) -> None:
    aligns = command.startswith("align")
    main_data, other_data = (train_data, attack_data) if aligns else (attack_data, train_data)
    data = {"train_data": main_data, **({second: other_data} if second else {})}
    out = trained(command, *(word for flag, path in data.items() for word in (f"--{flag}", path)), *words)
    before, after = (load_file(folder / "model.safetensors") for folder in (model_dir, out))
    assert before.keys() == after.keys()
    assert not same_bits(before, after)
    record = read_json(out / "holdfast.json")
    assert logged <= record["log"].keys()
    assert data.items() <= record["data"].items()
    assert str(record["config"][words[0].removeprefix("--")]) == words[1]
    assert (out / "weights.jsonl").exists() is (command == "finetune antibody")
    shown = capsys.readouterr()
    assert shown.out == ""
    method, rows = command.split()[1], 10 if aligns else 6
    assert f"{'aligning' if aligns else 'fine-tuning'} {model_dir} with {method} on {rows} rows" in shown.err
    assert ("choosing safety rows" in shown.err) is (method == "spard" and words[-1] != "all")


def test_a_pool_in_a_recipe(
    trained: Callable[..., Path],
    model_dir: Path,
    train_data: str,
    attack_data: str,
    benign_data: str,
    tmp_path: Path,
) -> None:
    """Harmless prompts need no answers; a refusal may be in a file."""
    prompts, refusals, recipe = (tmp_path / name for name in ("harmless.jsonl", "refusals.txt", "recipe.yaml"))
    prompts.write_text("".join(json.dumps({"prompt": row["prompt"]}) + "\n" for row in read_lines(Path(benign_data))))
    refusals.write_text("No.\nNever.\n")
    names = ("ablation", "base", "prefill", "dropping", "ablation+fine-tuning", "ablation+prefill")
    pool = {**dict.fromkeys(names, 1), "rounding": {"weight": 1, "bits": [8, 4]}}
    pool["fine-tuning"] = {"weight": 1, "learning_rate": {"low": 1e-4, "high": 1e-3}}
    pool["fine-tuning+prefill"] = {"weight": 2, "rounds": 2, "prefill": {"opener": ["Rust,", "Sure"]}}
    text = yaml.safe_dump({"pool": pool, "attack_scale": [0.5, 1.5], "estimator": "sampled"})
    recipe.write_text(text.replace("0.0001", "1e-4"))  # which YAML itself reads as text
    words = ["--train_data", train_data, "--attack_data", attack_data, "--benign_data", str(prompts)]
    words += ["--base", str(model_dir), "--refusal", str(refusals), "--config", str(recipe), "--alpha", "1"]
    out = trained("align patcher", *words, "--attack_every", "1", "--attack_steps", "2", tiny=("--max_steps", "6"))
    record = read_json(out / "holdfast.json")
    assert record["config"]["pool"] == pool
    assert record["data"]["benign_data"] == str(prompts)
    assert record["taken"]["benign_data"][0]["rows"] == 4
    assert record["log"]["attacked_loss"] > 0


def test_a_pool_in_which_nothing_is_trained_needs_no_attack_data(trained: Callable[..., Path], train_data: str) -> None:
    pool = """--pool={"dropping":1,"rounding":1}"""
    words = ["--train_data", train_data, pool, "--attack_every", "1", "--alpha", "1", "--estimator", "sampled"]
    record = read_json(trained("align patcher", *words) / "holdfast.json")
    assert record["data"].keys() == record["taken"].keys() == {"train_data"}
    assert record["log"]["attacked_loss"] > 0


@pytest.mark.parametrize("estimator", ["exact", "sampled"])
def test_rows_to_retain_are_read_and_recorded(
    trained: Callable[..., Path], train_data: str, attack_data: str, estimator: str
) -> None:
    words = ["--train_data", train_data, "--attack_data", attack_data, "--retain_data", train_data]
    words += ["--retain_weight", "5", "--estimator", estimator, "--attack_every", "100"]
    record = read_json(trained("align patcher", *words, tiny=("--max_steps", "6")) / "holdfast.json")
    assert record["data"]["retain_data"] == train_data
    assert record["taken"]["retain_data"] == record["taken"]["train_data"]
    assert record["config"]["retain_weight"] == 5
    assert record["log"]["retain_loss"] > 0
    assert record["log"]["passes"] == (12 if estimator == "exact" else 6)


def test_rows_to_reroute_are_the_attackers_and_need_rows_to_retain(
    trained: Callable[..., Path], train_data: str, attack_data: str, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--train_data", train_data, "--attack_data", attack_data, "--attack_every", "2", "--reroute_weight", "2"]
    out = trained("align patcher", *words, "--retain_data", train_data, tiny=("--max_steps", "3"))
    record = read_json(out / "holdfast.json")
    assert record["log"]["reroute_loss"] > 0
    assert record["log"]["passes"] >= 3 * 3  # safe, retained and rerouted, beside what is attacked and attacks
    capsys.readouterr()
    words += ["--model", record["model"], "--output_dir", str(out.parent / "other")]
    assert main(["align", "patcher", *words]) == 2
    assert "--reroute_weight needs --attack_data, whose rows are led elsewhere, and --retain_data" in (
        " ".join(capsys.readouterr().err.split())
    )
    assert not (out.parent / "other").exists()


def test_the_strong_preset_defends_and_retains(
    trained: Callable[..., Path], train_data: str, attack_data: str, capsys: pytest.CaptureFixture[str]
) -> None:
    preset = yaml.safe_load(PRESETS["strong"].read_text(encoding="utf-8"))
    words = ["--train_data", train_data, "--attack_data", attack_data, "--preset", "strong", "--refusal", "No."]
    words += ["--retain_data", train_data, "--benign_data", train_data]
    out = trained("align patcher", *words, tiny=("--max_steps", str(preset["attack_every"] + 12)))
    record = read_json(out / "holdfast.json")
    assert {name: record["config"][name] for name in preset} == preset
    assert min(record["log"][name] for name in ("safe_loss", "attacked_loss", "retain_loss")) > 0
    capsys.readouterr()
    words += ["--model", record["model"], "--output_dir", str(out.parent / "other"), "--alpha", "0.5"]
    assert main(["align", "patcher", *words]) == 2
    assert "--preset strong has another --alpha than the one that is given" in capsys.readouterr().err
    assert not (out.parent / "other").exists()


def test_embeddings_are_used_again(trained: Callable[..., Path], train_data: str, attack_data: str) -> None:
    words = ["--train_data", attack_data, "--safety_data", train_data]
    folders = [trained("finetune spard", *words) for _ in range(2)]
    beside = Path(train_data).parent
    assert len(list(beside.glob("alignment.jsonl.embeddings-*"))) == len(list(beside.glob("attack.jsonl.emb*"))) == 1
    assert same_bits(*(load_file(folder / "model.safetensors") for folder in folders))


@pytest.mark.parametrize("rule", [{"rule": "random"}, {"rule": "dpp", "beta": 2.0}])
def test_flags_reach_the_choice_of_safety_rows(
    rule: dict[str, Any],
    trained: Callable[..., Path],
    train_data: str,
    attack_data: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from holdfast.cli import finetune

    asked: list[dict[str, Any]] = []
    choose = finetune.choose_safety_rows

    def noted(safety: Dataset, upload: Dataset, model: Any, written: ChatFormat, **how: Any) -> Dataset:
        asked.append({**how, "system_prompt": written.system_prompt})
        return choose(safety, upload, model, written, **how)

    monkeypatch.setattr(finetune, "choose_safety_rows", noted)
    given = {**rule, "share": 0.5, "seed": 7, "system_prompt": "Be kind."}
    flags = {"rule": "--safety_selection", "share": "--safety_share", "beta": "--safety_beta"}
    words = [str(word) for name, value in given.items() for word in (flags.get(name, f"--{name}"), value)]
    trained("finetune spard", "--train_data", attack_data, "--safety_data", train_data, *words)
    files = {"safety_file": Path(train_data), "upload_file": Path(attack_data)}
    assert asked == [{"beta": 4.0, **given, **files}]


def test_weights_of_rows(trained: Callable[..., Path], attack_data: str, tmp_path: Path) -> None:
    (tmp_path / "refusals.txt").write_text("I cannot help with that.\nNo.\n")
    out = trained("finetune antibody", "--train_data", attack_data, "--refusal", str(tmp_path / "refusals.txt"))
    weights = read_lines(out / "weights.jsonl")
    assert [entry["row"] for entry in weights] == list(range(1, 7))  # three batches of two: every row once
    assert sum(entry["weight"] for entry in weights) == pytest.approx(6)
    assert all(0 < entry["weight"] < 2 for entry in weights)


def test_an_adapter_goes_on(trained: Callable[..., Path], model_dir: Path, train_data: str, attack_data: str) -> None:
    """The one that was aligned is the one that is fine-tuned: no second adapter, and its base is not touched."""
    base = load_file(model_dir / "model.safetensors")
    peft = ["--use_peft", "--lora_r", "2", "--lora_target_modules", "q_proj", "v_proj"]
    aligned = trained("align booster", "--train_data", train_data, "--attack_data", attack_data, *peft)
    before = load_file(aligned / "adapter_model.safetensors")
    for command in ("finetune antibody", "finetune lisa"):
        data = ["--safety_data", train_data, "--safety_steps", "1"] if "lisa" in command else []
        tuned = trained(command, "--train_data", attack_data, *data, model=aligned)
        after = load_file(tuned / "adapter_model.safetensors")
        assert not (tuned / "model.safetensors").exists()
        assert {name: weight.shape for name, weight in after.items()} == {name: w.shape for name, w in before.items()}
        assert all(not torch.equal(weight, before[name]) for name, weight in after.items())
        assert read_json(tuned / "adapter_config.json")["base_model_name_or_path"] == str(model_dir)
    assert same_bits(load_file(model_dir / "model.safetensors"), base)


@pytest.mark.parametrize(
    ("method", "words"),
    [("lisa", ["--safety_steps", "1", "--user_steps", "1"]), ("spard", ["--safety_share", "0.5"]), ("antibody", [])],
)
def test_resumed_run_ends_as_one_that_went_through(
    trained: Callable[..., Path], train_data: str, attack_data: str, method: str, words: list[str]
) -> None:
    data = ["--train_data", attack_data, *(["--safety_data", train_data] if method != "antibody" else [])]
    saving = ("--save_strategy", "steps", "--save_steps", "2", "--max_steps", "5")
    whole = trained(f"finetune {method}", *data, *words, tiny=saving)
    checkpoint = ("--resume_from_checkpoint", str(whole / "checkpoint-2"))
    resumed = trained(f"finetune {method}", *data, *words, tiny=(*saving, *checkpoint))
    assert same_bits(*(load_file(folder / "model.safetensors") for folder in (whole, resumed)))
    assert read_json(resumed / "holdfast.json")["resumed_from"] == str(whole / "checkpoint-2")
    if method == "antibody":
        assert read_lines(resumed / "weights.jsonl") == read_lines(whole / "weights.jsonl")


def test_one_row_has_no_other_to_be_weighed_against(
    model_dir: Path, write_rows: Callable[..., str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = write_rows("one.jsonl", [{"prompt": "How?", "completion": "Salt."}])
    words = ["--model", str(model_dir), "--train_data", data, *TINY, "--output_dir", str(tmp_path / "out")]
    assert main(["finetune", "antibody", *words]) == 2
    assert capsys.readouterr().err.splitlines()[-1].startswith("holdfast: the train data has one row")
    assert not (tmp_path / "out").exists()
