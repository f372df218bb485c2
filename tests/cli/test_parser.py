"""Recipes are read exactly as flags are."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from trl import SFTConfig

from holdfast.cli.arguments import ModelArguments
from holdfast.cli.effects import Effect
from holdfast.cli.parser import HoldfastParser
from holdfast.errors import InputError


@dataclass
class Arguments:
    output_dir: str
    rate: float = 0.1
    steps: int = 10
    length: int | None = 1024
    limit: int | None = None
    fast: bool = True
    mixed: bool | None = None
    names: list[str] | None = None
    counts: list[int] = field(default_factory=list)
    keywords: dict[str, Any] | str | None = None
    strategy: str = field(default="steps", metadata={"choices": ["no", "steps"]})
    optim: str = "adamw"
    shards: str | None = field(default=None, metadata={"nargs": "?", "const": True})  # as transformers' `fsdp`


def parse(recipe: Path | None, *argv: str) -> Arguments:
    parser = HoldfastParser((Arguments,), prog="holdfast test")
    words = [] if recipe is None else ["--config", str(recipe)]
    arguments, _ = parser.parse([*words, *argv])
    assert isinstance(arguments, Arguments)
    return arguments


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    return tmp_path / "recipe.yaml"


@pytest.mark.parametrize(
    ("line", "name", "expected"),
    [
        ("rate: 1e-5", "rate", 1e-5),  # YAML itself reads this as text
        ("rate: 1", "rate", 1.0),
        ("steps: 15_000", "steps", 15000),
        ("length: null", "length", None),
        ("length: ~", "length", None),
        ("limit: null", "limit", None),
        ("fast: false", "fast", False),
        ("fast: no", "fast", False),
        ("mixed: true", "mixed", True),
        ("mixed: null", "mixed", None),
        ("shards: true", "shards", True),
        ("shards: false", "shards", None),
        ("names: [a, b]", "names", ["a", "b"]),
        ("names: a", "names", ["a"]),
        ("counts: [0, 2, 5]", "counts", [0, 2, 5]),
        ("keywords: {thinking: false, depth: 2}", "keywords", '{"thinking": false, "depth": 2}'),
        ("strategy: no", "strategy", "no"),  # and this as false
        ("optim: 8", "optim", "8"),
        ("optimizer: sgd", "optim", "sgd"),
    ],
)
def test_recipe_values(recipe: Path, line: str, name: str, expected: object) -> None:
    recipe.write_text(f"output_dir: out\n{line}\n")
    value = getattr(parse(recipe), name)
    assert value == expected
    assert type(value) is type(expected)


def test_flags_override_the_recipe(recipe: Path) -> None:
    recipe.write_text("output_dir: out\nsteps: 3\nrate: 0.5\ncounts: [1, 2]\n")
    arguments = parse(recipe, "--steps", "4", "--counts", "7")
    assert (arguments.steps, arguments.rate, arguments.counts) == (4, 0.5, [7])


def test_config_with_equals_sign(recipe: Path) -> None:
    recipe.write_text("output_dir: out\nsteps: 3\n")
    assert parse(None, f"--config={recipe}").steps == 3


def test_aliases_as_flags_and_as_keys(recipe: Path) -> None:
    recipe.write_text(
        "model: m\nbatch_size: 3\noptimizer: sgd\nscheduler: constant\noutput_dir: out\nuse_cpu: true\nbf16: false\n"
    )
    parser = HoldfastParser((ModelArguments, SFTConfig), prog="holdfast test")
    model, config, _ = parser.parse(["--config", str(recipe), "--batch_size", "5"])
    assert model.model_name_or_path == "m"
    assert (config.per_device_train_batch_size, config.optim, config.lr_scheduler_type) == (5, "sgd", "constant")
    assert config.report_to == []


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("speed: 3", "unknown key 'speed'"),
        ("config: other.yaml", "unknown key 'config'"),
        ("- output_dir", "expected a YAML mapping"),
        ("", "expected a YAML mapping of flags to values, found nothing"),
        ("a: b: c", "is not valid YAML"),
        ("steps: 1\nfast: true\nsteps: 2", "the key 'steps' of line 1 stands again in line 3"),
        ("optim: a\noptimizer: b", "'optim' and 'optimizer' set the same value"),
        ("steps: [1, 2]", "steps takes a single value"),
        ("no_fast: true", "write fast: false"),
    ],
)
def test_unusable_recipe_is_named(recipe: Path, text: str, expected: str) -> None:
    recipe.write_text(text)
    with pytest.raises(InputError, match=expected) as caught:
        parse(recipe, "--output_dir", "out")
    assert str(recipe) in str(caught.value)


def test_missing_recipe_is_named(recipe: Path) -> None:
    with pytest.raises(InputError, match="cannot be read") as caught:
        parse(recipe)
    assert str(recipe) in str(caught.value)


def test_recipe_that_is_not_utf8(recipe: Path) -> None:
    recipe.write_bytes(b"optim: caf\xe9")
    with pytest.raises(InputError, match="is not UTF-8 text"):
        parse(recipe)


@pytest.mark.parametrize(
    "line", ["steps: 10.5", "steps: true", "rate: fast", "strategy: maybe", "fast: 3", "steps: null"]
)
def test_wrong_value_names_recipe_and_key(recipe: Path, line: str, capsys: pytest.CaptureFixture[str]) -> None:
    recipe.write_text(f"output_dir: out\n{line}\n")
    with pytest.raises(SystemExit) as left:
        parse(recipe)
    assert left.value.code == 2
    shown = capsys.readouterr().err
    assert shown.startswith(f"holdfast test: {recipe}: error: argument --{line.split(':')[0]}")
    assert shown.count("\n") == 1


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        ([], "the following arguments are required: --output_dir"),
        (["--output_dir", "out", "--steps", "many"], "argument --steps: invalid int value: 'many'"),
        (["--output_dir", "out", "--step", "3"], "unrecognized arguments: --step 3"),
        (["--output_dir", "out", "--config"], "argument --config: expected one argument"),
        (["--output_dir", "out", "left"], "unrecognized arguments: left"),
    ],
)
def test_wrong_flags_are_one_line(argv: list[str], expected: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        parse(None, *argv)
    assert left.value.code == 2
    assert capsys.readouterr().err == f"holdfast test: error: {expected}\n"


def test_broken_json_names_the_flag() -> None:
    parser = HoldfastParser((SFTConfig,), prog="holdfast test")
    with pytest.raises(InputError, match=r"--lr_scheduler_kwargs: '{a' is not valid JSON"):
        parser.parse(["--output_dir", "out", "--use_cpu", "--bf16", "false", "--lr_scheduler_kwargs", "{a"])


def test_a_recipe_cannot_set_environment_variables(recipe: Path) -> None:
    recipe.write_text("env: {HF_ENDPOINT: elsewhere}\noutput_dir: out\n")
    with pytest.raises(InputError, match="unknown key 'env'"):
        parse(recipe)


# ---------------------------------------------------------------------- presets


@pytest.fixture
def preset(tmp_path: Path) -> Path:
    path = tmp_path / "swift.yaml"
    path.write_text("rate: 0.5\nkeywords: {a: 1e-5}\ncounts: [1, 2]\n")
    return path


def parse_with(preset: Path, *argv: str) -> Arguments:
    parser = HoldfastParser((Arguments,), prog="holdfast test", presets={"swift": preset})
    arguments, _ = parser.parse(["--output_dir", "o", *argv])
    assert isinstance(arguments, Arguments)
    return arguments


def test_a_preset_sets_what_it_names_and_nothing_else(preset: Path, recipe: Path) -> None:
    assert parse_with(preset) == Arguments("o")
    found = Arguments("o", rate=0.5, keywords='{"a": 1e-05}', counts=[1, 2], steps=7)
    assert parse_with(preset, "--preset", "swift", "--steps", "7") == found
    recipe.write_text("preset: swift\nsteps: 7\n")
    assert parse_with(preset, "--config", str(recipe)) == found


@pytest.mark.parametrize("argv", [["--rate", "0.1"], ["--rate", "0.2"], ["--counts", "1"], ["--keywords", '{"a": 2}']])
def test_what_contradicts_a_preset_is_refused_though_it_were_the_default(argv: list[str], preset: Path) -> None:
    with pytest.raises(InputError, match=f"--preset swift has another {argv[0]} than the one that is given"):
        parse_with(preset, "--preset", "swift", *argv)


def test_a_recipe_that_contradicts_its_preset_is_refused(preset: Path, recipe: Path) -> None:
    recipe.write_text("preset: swift\nrate: 0.3\n")
    with pytest.raises(InputError, match="--preset swift has another --rate than the one that is given"):
        parse_with(preset, "--config", str(recipe))
    recipe.write_text("preset: swift\nrate: 0.5\n")
    assert parse_with(preset, "--config", str(recipe)).rate == 0.5


def test_a_preset_of_which_a_part_would_play_no_part_is_refused(preset: Path) -> None:
    idle = Effect("rate", lambda given: given.fast, "without --fast")
    parser = HoldfastParser((Arguments,), prog="holdfast test", presets={"swift": preset}, effects=[idle])
    parser.parse(["--output_dir", "o", "--preset", "swift"])
    with pytest.raises(InputError, match="--preset swift: --rate plays no part without --fast"):
        parser.parse(["--output_dir", "o", "--preset", "swift", "--fast", "false"])


def test_what_a_preset_needs_is_told_at_once(preset: Path, recipe: Path) -> None:
    needs = {"swift": ("steps", "fast")}
    parser = HoldfastParser((Arguments,), prog="holdfast test", presets={"swift": preset}, needs=needs)
    words = ["--output_dir", "o", "--preset", "swift"]
    with pytest.raises(InputError, match=r"^--preset swift needs --steps, --fast; missing: --steps, --fast$"):
        parser.parse(words)
    recipe.write_text("steps: 7\n")
    with pytest.raises(InputError, match=r"missing: --fast$"):
        parser.parse([*words, "--config", str(recipe)])
    *_, rest = parser.parse([*words, "--config", str(recipe), "--fast", "true"])
    assert rest.preset == "swift"


def test_an_unknown_preset_is_refused(preset: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse_with(preset, "--preset", "weak")
    assert "--preset: invalid choice: 'weak' (choose from" in capsys.readouterr().err


def test_a_command_without_presets_has_no_such_flag(recipe: Path) -> None:
    recipe.write_text("preset: swift\n")
    with pytest.raises(InputError, match="unknown key 'preset'"):
        parse(recipe, "--output_dir", "o")
