"""Every recipe is a working --config of the command that its first line names; those of the gate are policies."""

import shlex
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

RECIPES = sorted(
    path for path in Path(__file__).parents[2].joinpath("recipes").rglob("*.yaml") if path.parent.name != "gate"
)


def parse_recipe(path: Path) -> tuple[list[str], tuple[Any, ...]]:
    first = path.read_text(encoding="utf-8").splitlines()[0]
    program, command, *rest = shlex.split(first.removeprefix("#"))
    assert program == "holdfast"
    method = rest[: rest.index("--config")]
    argv = rest[len(method) :]
    assert Path(argv[1]) == Path("recipes", *path.parts[path.parts.index("recipes") + 1 :])
    parser = import_module(f"holdfast.cli.{command}").make_parser(*method)
    return [command, *method], parser.parse(["--config", str(path), *argv[2:]])


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: f"{path.parent.name}/{path.name}")
def test_recipe_parses(path: Path) -> None:
    parse_recipe(path)


def test_there_are_recipes_for_every_published_setup() -> None:
    names = {path.stem for path in RECIPES}
    assert {"patcher-qwen2.5-1.5b", "patcher-qwen3-4b", "patcher-llama3-8b", "attack", "align-patcher"} <= names


@pytest.mark.parametrize("model", ["patcher-qwen2.5-1.5b", "patcher-qwen3-4b", "patcher-llama3-8b"])
def test_the_papers_sequential_setting(model: str) -> None:
    path = next(path for path in RECIPES if path.stem == model)
    _, (_, _, config, *_) = parse_recipe(path)
    assert (config.alpha, config.attack_steps, config.attack_every, config.max_steps) == (0.5, 300, 1000, 15000)
    assert config.learning_rate == config.attack_learning_rate == 1e-5
    assert config.lr_scheduler_type == "constant"
    assert (config.per_device_train_batch_size, config.attack_batch_size) == (4, 2)
    assert config.weight_decay == config.attack_weight_decay == 0.01
    assert config.max_grad_norm == 1.0
    assert config.system_prompt.startswith("Below is an instruction that describes a task.")
    expected = {"enable_thinking": False} if "qwen3" in model else None
    assert config.chat_template_kwargs == expected


def test_the_papers_attack() -> None:
    path = next(path for path in RECIPES if path.parts[-2:] == ("paper", "attack.yaml"))
    command, (_, data, _, _, measure, config, _) = parse_recipe(path)
    assert command == ["attack", "full"]
    assert (data.num_samples, data.poison_ratio, config.max_steps, config.learning_rate) == (1000, 0.2, 2000, 1e-5)
    assert (measure.decoding, measure.max_prompts, measure.max_new_tokens) == ("paper", 250, 256)
