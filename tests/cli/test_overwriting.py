"""--overwrite_output_dir: results that lie there stay until others take their place, whole and all together."""

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from helpers import files_no_longer_than
from holdfast.cli import main
from holdfast.evaluation.evaluate import Evaluator

Refused = Callable[..., str]
QUICK = ["--max_steps", "1", "--batch_size", "2", "--gradient_checkpointing", "false"]


@pytest.fixture
def words(model_dir: Path, train_data: str, attack_data: str, benign_data: str, eval_data: str) -> dict[str, list[str]]:
    model, harmful = ["--model", str(model_dir)], ["--attack_data", attack_data]
    measured = ["--eval_data", eval_data, "--max_new_tokens", "2"]
    return {
        "align": ["align", "sft", *model, "--train_data", train_data, *QUICK],
        "lora": ["align", "sft", *model, "--train_data", train_data, *QUICK, "--use_peft", "--lora_r", "2"],
        "antibody": ["finetune", "antibody", *model, "--train_data", train_data, *QUICK],
        "attack": ["attack", "full", *model, *harmful, *QUICK, *measured],
        "ablation": ["attack", "ablation", *model, *harmful, "--benign_data", benign_data],
        "prefill": ["attack", "prefill", *model, *measured],
        "repair": ["repair", "antidote", *model, *harmful],
    }


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "out"


def content(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("command", ["align", "attack"])
def test_a_run_that_a_reporter_refuses_has_not_begun(
    words: dict[str, list[str]], command: str, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words[command] += ["--save_strategy", "steps", "--save_steps", "1"]
    assert main([*words[command], "--output_dir", str(out)]) == 0
    before = content(out)
    assert any(name.startswith("checkpoint-1/") for name in before)

    def init(**_: object) -> None:
        raise RuntimeError("No API key configured.")

    monkeypatch.setattr("transformers.integrations.integration_utils.is_wandb_available", lambda: True)
    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(run=None, init=init))
    monkeypatch.setitem(sys.modules, "wandb.sdk.lib.config_util", SimpleNamespace(ConfigError=KeyError))
    again = [*words[command], "--output_dir", str(out), "--overwrite_output_dir", "--report_to", "wandb"]
    assert main(again) == 2
    assert content(out) == before


def test_an_attack_that_is_killed_leaves_nothing_of_the_one_before(
    words: dict[str, list[str]], out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert main([*words["attack"], "--output_dir", str(out)]) == 0
    evaluate, asked = Evaluator.__call__, []

    def interrupted(self: Evaluator, *arguments: Any) -> Any:
        asked.append(self)
        if len(asked) == 2:
            raise KeyboardInterrupt
        return evaluate(self, *arguments)

    monkeypatch.setattr(Evaluator, "__call__", interrupted)
    assert main([*words["attack"], "--output_dir", str(out), "--overwrite_output_dir"]) == 130
    assert sorted(content(out)) == ["points.jsonl", "samples.jsonl"]
    assert len((out / "points.jsonl").read_text().splitlines()) == 1


@pytest.mark.parametrize("command", ["align", "repair", "ablation"])
def test_a_full_disk_leaves_the_model_that_was_there(
    words: dict[str, list[str]], command: str, out: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """And its record, beside a checkpoint of the new run at most."""
    words[command] += ["--save_strategy", "no"] if command == "align" else []
    assert main([*words[command], "--output_dir", str(out)]) == 0
    before = content(out)
    changed = ["--max_steps", "2"] if command == "align" else []
    again = [*words[command], *changed, "--output_dir", str(out), "--overwrite_output_dir"]
    with files_no_longer_than(20_000):
        assert main(again) == 1
    assert "weights could not be written or read" in capsys.readouterr().err
    assert content(out) == before
    assert main(again) == 0
    assert content(out).keys() == before.keys()


def test_a_full_disk_leaves_no_part_of_an_attacked_model(words: dict[str, list[str]], out: Path) -> None:
    with files_no_longer_than(20_000):
        assert main([*words["attack"], "--output_dir", str(out)]) == 1
    assert sorted(content(out)) == ["points.jsonl", "samples.jsonl"]


@pytest.mark.parametrize("command", ["align", "repair"])
def test_a_whole_model_takes_the_place_of_an_adapter(words: dict[str, list[str]], command: str, out: Path) -> None:
    """Nothing of it stays, or the next command would put it on its base."""
    assert main([*words["lora"], "--output_dir", str(out)]) == 0
    assert (out / "adapter_config.json").exists()
    assert main([*words[command], "--output_dir", str(out), "--overwrite_output_dir"]) == 0
    assert not list(out.glob("adapter*"))
    assert (out / "model.safetensors").exists()
    assert main([*words["lora"], "--output_dir", str(out), "--overwrite_output_dir"]) == 0
    assert not list(out.glob("model*"))


def test_reports_go_with_their_run(words: dict[str, list[str]], out: Path) -> None:
    assert main([*words["antibody"], "--output_dir", str(out)]) == 0
    assert (out / "weights.jsonl").exists()
    assert main([*words["align"], "--output_dir", str(out), "--overwrite_output_dir"]) == 0
    assert not (out / "weights.jsonl").exists()


def test_an_attack_without_a_model_leaves_none_of_another(words: dict[str, list[str]], out: Path) -> None:
    assert main([*words["ablation"], "--output_dir", str(out)]) == 0
    assert (out / "model").exists()
    assert main([*words["prefill"], "--output_dir", str(out), "--overwrite_output_dir"]) == 0
    assert not (out / "model").exists()
    assert json.loads((out / "results.json").read_text())["command"] == "attack prefill"


@pytest.mark.parametrize("command", ["align", "repair", "attack", "ablation"])
def test_a_model_that_is_no_run_of_ours_is_not_written_over(
    words: dict[str, list[str]], command: str, out: Path, model_dir: Path, refused: Refused
) -> None:
    place = out / "model" if command in ("attack", "ablation") else out
    shutil.copytree(model_dir, place)
    before = content(out)
    assert "or pass --overwrite_output_dir" in refused(*words[command], "--output_dir", str(out), output=False)
    assert content(out) == before
    assert main([*words[command], "--output_dir", str(out), "--overwrite_output_dir"]) == 0
