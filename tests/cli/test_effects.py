"""Flags that would play no part: an error where they are typed, a warning where a recipe has them."""

from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

from holdfast.cli.effects import ATTACKS, JUDGING, LISA, MEASURING, PATCHER, SPARD, SUITE, TRAINING
from holdfast.cli.parser import HoldfastParser
from holdfast.errors import InputError

ALIGN = ["--model", "m", "--train_data", "t", "--output_dir", "o"]
PATCH = [*ALIGN, "--attack_data", "a"]
TUNE = [*ALIGN, "--safety_data", "s"]
ATTACK = ["--model", "m", "--output_dir", "o"]
JUDGE = ["s.jsonl", "--output_dir", "o"]
ABLATE = [*ATTACK, "--attack_data", "a", "--benign_data", "b"]

CASES: list[tuple[str, list[str], str, str]] = [
    ("align sft", ALIGN, "--lora_r 8", "--use_peft"),
    ("align sft", ALIGN, "--lora_target_modules q_proj", "--use_peft"),
    ("align sft", ALIGN, "--use_dora", "--use_peft"),
    ("align sft", ALIGN, "--bnb_4bit_quant_type fp4", "--load_in_4bit"),
    ("align sft", ALIGN, "--eval_data e", "--eval_strategy epoch"),
    ("align sft", ALIGN, "--eval_steps 5 --eval_data e", "--eval_strategy steps"),
    ("align sft", ALIGN, "--eval_steps 5 --eval_data e --eval_strategy epoch", "--eval_strategy steps"),
    ("align sft", ALIGN, "--per_device_eval_batch_size 5", "--eval_data e --eval_strategy epoch"),
    ("align sft", ALIGN, "--save_steps 5 --save_strategy epoch", "--save_strategy steps"),
    ("align sft", ALIGN, "--save_total_limit 5 --save_strategy no", "--save_strategy epoch"),
    ("align sft", ALIGN, "--logging_steps 5 --logging_strategy epoch", "--logging_strategy steps"),
    ("align sft", ALIGN, "--warmup_steps 5 --scheduler constant", "--scheduler constant_with_warmup"),
    ("align sft", ALIGN, """--lr_scheduler_kwargs={"a":1} --scheduler constant""", "--scheduler cosine"),
    ("align sft", ALIGN, "--adam_beta2 0.9 --optimizer sgd", "--optimizer adamw_torch"),
    ("align sft", ALIGN, "--optim_args momentum=0.9", "--optimizer sgd"),
    ("attack full", ATTACK, "--optim_target_modules q_proj", "--optimizer galore_adamw"),
    ("align sft", ALIGN, "--dataloader_persistent_workers", "--dataloader_num_workers 1"),
    (
        "align sft",
        ALIGN,
        """--gradient_checkpointing_kwargs={"use_reentrant":false} --gradient_checkpointing false""",
        "--gradient_checkpointing true",
    ),
    ("align sft", ALIGN, "--packing_strategy wrapped", "--packing"),
    ("align sft", ALIGN, "--hub_model_id me/it", "--push_to_hub --hub_strategy end"),
    ("align sft", ALIGN, "--metric_for_best_model loss", "--save_strategy best --eval_strategy epoch"),
    ("align sft", ALIGN, "--run_name mine", "--report_to tensorboard"),
    ("align patcher", PATCH, "--publish_every 5", "--parallel"),
    ("align patcher", PATCH, "--attackers 2", "--parallel"),
    ("align patcher", PATCH, "--attack_scale 0.3 1.5 --alpha 0", "--alpha 0.1"),
    (
        "align patcher",
        PATCH,
        """--attack_scale 0.3 1.5 --refusal no --pool={"prefill":1}""",
        """--pool={"prefill":1,"rounding":1}""",
    ),
    ("align patcher", ALIGN, """--pool={"dropping":1} --alpha 0""", "--alpha 0.1"),
    ("align patcher", ALIGN, """--attack_steps 5 --pool={"dropping":1}""", """--pool={"dropping+lora":1}"""),
    (
        "align patcher",
        PATCH,
        """--attack_steps 5 --pool={"lora":{"weight":1,"steps":3},"fine-tuning":0}""",
        """--pool={"lora":{"weight":1,"steps":3},"fine-tuning":1}""",
    ),
    (
        "align patcher",
        PATCH,
        """--attack_learning_rate 1e-5 --pool={"lora":{"weight":1,"learning_rate":1e-4}}""",
        """--pool={"lora":{"weight":1,"relative_rate":2}}""",
    ),
    (
        "align patcher",
        PATCH,
        """--attack_batch_size 2 --pool={"dropping+lora":{"weight":1,"lora":{"batch_size":[2,4]}}}""",
        """--pool={"dropping+lora":{"weight":1,"lora":{"steps":3}}}""",
    ),
    (
        "align patcher",
        ALIGN,
        """--attack_data a --pool={"dropping":1,"rounding":1}""",
        """--pool={"dropping+prefill":1} --refusal no""",
    ),
    ("align patcher", ALIGN, """--attack_data a --pool={"dropping":1}""", "--reroute_weight 1"),
    ("align patcher", ALIGN, """--pool={"dropping":1} --alpha 0""", "--reroute_weight 1"),
    ("align patcher", PATCH, "--reroute_layers 1", "--reroute_weight 1"),
    ("align patcher", PATCH, "--retain_alpha 0.5", "--retain_data r"),
    ("align patcher", PATCH, "--origin_decay 4", "--retain_data r"),
    ("align patcher", ALIGN, """--pool={"dropping":1} --alpha 0""", "--retain_alpha 0.5 --retain_data r"),
    ("align patcher", PATCH, "--benign_data b", """--pool={"ablation":1}"""),
    ("align patcher", PATCH, "--retain_weight 5", "--retain_data r"),
    ("align patcher", PATCH, "--base b", """--pool={"base+lora":1}"""),
    ("align patcher", PATCH, "--refusal no", """--pool={"prefill":1}"""),
    ("finetune lisa", TUNE, "--proximal_start 0.3 --rho 0", "--rho 1"),
    ("finetune spard", TUNE, "--safety_share 0.1 --safety_selection all", "--safety_selection random"),
    ("finetune spard", TUNE, "--safety_beta 0.1 --safety_selection random", "--safety_selection dpp"),
    ("attack full", ATTACK, "--save_steps 5", "--save_strategy steps"),
    ("attack full", ATTACK, "--warmup_steps 5", "--scheduler linear"),
    ("attack full", ATTACK, "--benign_data b", "--poison_ratio 0.5"),
    ("attack full", ATTACK, "--attack_data b --poison_ratio 0", "--poison_ratio 0.5"),
    ("attack full", ATTACK, "--measure_at 0 5", "--capability_data c"),
    ("attack full", ATTACK, "--max_prompts 5", "--task_data c"),
    ("attack full", ATTACK, "--judge exact --capability_data c", "--eval_data e"),
    ("attack ablation", ABLATE, "--judge exact --capability_data c", "--eval_data e"),
    ("attack ablation", ABLATE, "--layer 1 --own_directions", "--own_directions false"),
    ("attack base", [*ATTACK, "--base", "b"], "--only_layer 1 --part outside", "--part mlp"),
    ("evaluate", ATTACK, "--judge exact --capability_data c", "--eval_data e"),
    ("evaluate", ATTACK, "--judge exact --capability_data c", "--over_refusal_data e"),
    ("evaluate", ATTACK, "--second_judge exact --capability_data c", "--eval_data e"),
    ("judge", JUDGE, "--judge_model m", "--judge rubric"),
    ("judge", JUDGE, "--judge_url u --second_judge rubric", "--judge strongreject"),
    ("judge", JUDGE, "--judge_key_variable K", "--judge strongreject"),
    ("judge", JUDGE, "--judge_template t", "--judge rubric"),
    ("judge", JUDGE, "--judge_pattern x --judge strongreject", "--judge rubric"),
    ("judge", JUDGE, "--second_judge_url u --judge rubric", "--second_judge strongreject"),
    ("judge", JUDGE, "--judge_timeout 5", "--second_judge rubric"),
    ("judge", JUDGE, "--judge_timeout 5 --judge wildguard", "--second_judge rubric"),
    ("judge", JUDGE, "--judge_label bad --judge rubric", "--judge classifier"),
    ("judge", JUDGE, "--judge_threshold 0.5", "--judge classifier"),
    ("judge", JUDGE, "--judge_batch_size 5", "--second_judge llama-guard"),
    ("judge", JUDGE, "--judge_max_tokens 5 --judge wildguard", "--second_judge generative"),
    ("judge", JUDGE, "--second_judge_label bad --judge classifier", "--second_judge classifier"),
]
NEVER = [
    ("attack full", ATTACK, "--lora_r 8"),
    ("attack full", ATTACK, "--eval_steps 5"),
    ("attack lora", ATTACK, "--per_device_eval_batch_size 5"),
    ("align sft", ALIGN, "--dataset_text_field text"),
]


def parser_of(command: str) -> HoldfastParser:
    name, *method = command.split()
    parser = import_module(f"holdfast.cli.{name}").make_parser(*method)
    assert isinstance(parser, HoldfastParser)
    return parser


def flag_of(words: str) -> str:
    return words.split()[0].partition("=")[0]


@pytest.mark.parametrize(("command", "needed", "idle", "cure"), CASES, ids=[f"{c[0]} {c[2]}" for c in CASES])
def test_flag_that_would_play_no_part_and_what_gives_it_one(
    command: str, needed: list[str], idle: str, cure: str
) -> None:
    with pytest.raises(InputError, match=f"^{flag_of(idle)} plays no part "):
        parser_of(command).parse([*needed, *idle.split()])
    parser_of(command).parse([*needed, *idle.split(), *cure.split()])


@pytest.mark.parametrize(("command", "needed", "idle"), NEVER)
def test_flag_that_never_plays_a_part(command: str, needed: list[str], idle: str) -> None:
    with pytest.raises(InputError, match=f"^{flag_of(idle)} plays no part "):
        parser_of(command).parse([*needed, *idle.split()])


def test_recipes_key_that_plays_no_part_is_only_told_of(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A flag may have overruled what it needs; typed as well, it is the flag that counts."""
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("save_steps: 5\nlora_r: 4\nuse_peft: true\nuse_dora: false\n")
    words = [*ALIGN, "--config", str(recipe), "--save_strategy", "no"]
    parser_of("align sft").parse(words)
    assert [record.message.partition(" without")[0] for record in caplog.records] == [
        "the recipe's save_steps plays no part"
    ]
    with pytest.raises(InputError, match=r"^--save_steps plays no part"):
        parser_of("align sft").parse([*words, "--save_steps", "7"])


def test_false_asks_for_nothing() -> None:
    parser_of("align sft").parse([*ALIGN, "--use_dora", "false", "--save_only_model", "false", "--save_strategy", "no"])


@pytest.mark.parametrize(
    ("command", "effects"),
    [
        ("align sft", TRAINING),
        ("align patcher", (*TRAINING, *PATCHER)),
        ("finetune lisa", LISA),
        ("finetune spard", SPARD),
        ("attack full", ATTACKS["full"]),
        ("attack lora", ATTACKS["lora"]),
        ("attack ablation", SUITE["ablation"]),
        ("attack base", SUITE["base"]),
        ("evaluate", MEASURING),
        ("judge", JUDGING),
    ],
)
def test_every_flag_is_one_of_its_command(command: str, effects: Any) -> None:
    known = {action.dest for action in parser_of(command)._actions}
    assert {name for effect in effects for name in effect.flags.split()} <= known


def test_patcher_whose_first_attack_comes_too_late(
    model_dir: Path, train_data: str, attack_data: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    main: Callable[[list[str]], int] = import_module("holdfast.cli").main
    words = ["--model", str(model_dir), "--train_data", train_data, "--attack_data", attack_data, "--batch_size", "2"]
    words += [
        "--max_length",
        "128",
        "--output_dir",
        str(tmp_path / "out"),
        "--attack_every",
        "2",
        "--attack_steps",
        "1",
    ]
    for steps, told in (("2", True), ("3", False)):
        assert main(["align", "patcher", *words, "--max_steps", steps, "--overwrite_output_dir"]) == 0
        assert ("will be aligned without one" in capsys.readouterr().err) is told
