"""Bad input at the command line: one sentence that names the file, row or flag, exit code 2, nothing written."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from helpers import tiny_llama
from holdfast.cli import main
from holdfast.cli.align import make_parser

Refused = Callable[..., str]


@pytest.fixture
def sft(model_dir: Path, train_data: str) -> list[str]:
    return ["align", "sft", "--model", str(model_dir), "--train_data", train_data]


@pytest.fixture
def patcher(sft: list[str], attack_data: str) -> list[str]:
    return ["align", "patcher", *sft[2:], "--attack_data", attack_data]


@pytest.fixture
def attack(model_dir: Path, attack_data: str) -> list[str]:
    return ["attack", "full", "--model", str(model_dir), "--attack_data", attack_data]


@pytest.mark.parametrize("flag", ["--model", "--train_data", "--attack_data"])
def test_path_that_is_neither_there_nor_on_the_hub(patcher: list[str], flag: str, refused: Refused) -> None:
    path = "no/such/place.jsonl" if flag != "--model" else "no/such/model"
    assert path in refused(*patcher, flag, path)


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b'{"question": "a", "reply": "b"}\n', "question"),
        (b"", "is empty"),
        (b'{"prompt": "a", "completion": "b"}\n[1]\n', "line 2"),
        (b'{"prompt": "a", "completion": "caf\xe9"}\n', "not valid UTF-8"),
        (b'{"prompt": "a"\n', "line 1 is not valid JSON"),
    ],
    ids=["column", "empty", "not-an-object", "utf-8", "json"],
)
def test_unusable_rows(sft: list[str], tmp_path: Path, content: bytes, expected: str, refused: Refused) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(content)
    sentence = refused(*sft, "--train_data", str(path))
    assert expected in sentence
    assert f"--train_data {path}" in sentence


def test_rows_without_a_completion_token(sft: list[str], refused: Refused) -> None:
    sentence = refused(*sft, "--max_length", "8")
    assert "10 of 10 rows of the train data" in sentence
    assert "the first is row 1" in sentence


def test_model_without_a_tokenizer(sft: list[str], model_dir: Path, refused: Refused) -> None:
    (model_dir / "tokenizer.json").unlink()
    assert "has no tokenizer" in refused(*sft)


def test_model_without_a_chat_template(sft: list[str], model_dir: Path, refused: Refused) -> None:
    (model_dir / "chat_template.jinja").unlink()
    assert "chat template" in refused(*sft)


def test_model_as_a_pickle(sft: list[str], model_dir: Path, refused: Refused) -> None:
    (model_dir / "model.safetensors").rename(model_dir / "pytorch_model.bin")
    assert "holds a pickle (pytorch_model.bin)" in refused(*sft)


@pytest.mark.parametrize("spelling", [["--trust_remote_code"], ["--trust-remote-code", "true"]])
def test_trust_remote_code(
    sft: list[str], attack: list[str], model_dir: Path, eval_data: str, spelling: list[str], refused: Refused
) -> None:
    evaluate = ["evaluate", "--model", str(model_dir), "--eval_data", eval_data]
    for words in (sft, attack, evaluate):
        assert "--trust_remote_code" in refused(*words, *spelling)


def test_trust_remote_code_in_a_recipe(sft: list[str], tmp_path: Path, refused: Refused) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("trust_remote_code: true\n")
    assert "--trust_remote_code" in refused(*sft, "--config", str(recipe))


def test_trust_remote_code_among_the_models_keywords(sft: list[str], refused: Refused) -> None:
    assert "--trust_remote_code" in refused(*sft, "--model_init_kwargs", '{"trust_remote_code": true}')


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("", "--attack_data is missing: harmful prompts with harmful answers, which simulated attacks train on"),
        ("--parallel", "--attack_data is missing"),
        ("--role attacker --exchange e", "--attack_data is missing"),
        ("""--pool={"dropping":1,"ablation+lora":1}""", "--attack_data is missing"),
        ("""--pool={"fine-tuning+prefill":1} --refusal no""", "--attack_data is missing"),
        ("""--pool={"ablation":1}""", "attack ablation needs harmful prompts; give --attack_data"),
        ("""--pool={"dropping+prefill":1} --refusal no""", "--pool: prefill needs harmful prompts; give --attack_data"),
    ],
)
def test_patcher_without_attack_data(sft: list[str], words: str, expected: str, refused: Refused) -> None:
    assert expected in refused("align", "patcher", *sft[2:], *words.split())


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("""--pool={"ablation":1}""", "attack ablation needs harmless prompts; give --benign_data"),
        ("--reroute_weight 1", "--reroute_weight needs --attack_data, whose rows are led elsewhere, and --retain_data"),
    ],
)
def test_patchers_data_are_asked_for_before_a_model_is(
    patcher: list[str], words: str, expected: str, refused: Refused
) -> None:
    place = patcher.index("--model") + 1
    assert expected in refused(*patcher[:place], "no/such/model", *patcher[place + 1 :], *words.split())


def test_the_base_of_a_pool_that_is_not_there(sft: list[str], refused: Refused) -> None:
    said = refused("align", "patcher", *sft[2:], """--pool={"base":1}""", "--base", "no/such/base")
    assert "--base: model no/such/base is neither a folder" in said


@pytest.mark.parametrize("alpha", ["-0.1", "1.5", "nan"])
def test_alpha_outside_its_range(patcher: list[str], alpha: str, refused: Refused) -> None:
    assert "--alpha must lie between 0 and 1" in refused(*patcher, "--alpha", alpha)


@pytest.mark.parametrize(
    ("flag", "value"),
    [
        ("--max_steps", "0"),
        ("--learning_rate", "-1e-4"),
        ("--learning_rate", "0"),
        ("--attack_steps", "0"),
        ("--attack_every", "-5"),
        ("--attack_learning_rate", "0"),
    ],
)
def test_steps_and_rates_that_are_not_positive(patcher: list[str], flag: str, value: str, refused: Refused) -> None:
    assert flag in refused(*patcher, flag, value)


@pytest.mark.parametrize("words", ["-0.5 1", "1.5 0.3", "1"])
def test_factors_of_the_attack_vector_out_of_range(patcher: list[str], words: str, refused: Refused) -> None:
    assert "--attack_scale takes two numbers" in refused(*patcher, "--attack_scale", *words.split())


SECOND = {
    "align booster": "--attack_data",
    "align antibody": "--attack_data",
    "finetune lisa": "--safety_data",
    "finetune spard": "--safety_data",
}


@pytest.mark.parametrize(
    ("pool", "words", "expected"),
    [
        ('{"ablation": 0}', [], "--pool: its weights do not sum to more than 0"),
        ('{"dropping": -1}', [], "--pool dropping: its weight must be a number not below 0, got -1"),
        ('{"dropping": 1e308, "rounding": 1e308}', [], "--pool: its weights do not come to a finite sum"),
        ('{"lora": 1, "ablation": 0}', ["--benign_data", "b"], "--benign_data plays no part without a --pool with"),
        (
            '{"lora": 1, "prefill": 0}',
            ["--refusal", "No."],
            "--refusal plays no part without a --pool with prefill",
        ),
        ('{"dropping": 1, "lora": 0}', ["--attack_steps", "3"], "--attack_steps plays no part with a --pool in which"),
        ('{"tuning": 1}', [], "--pool has no member 'tuning'; expected fine-tuning, lora, ablation"),
        ('{"dropping": {"weight": 1, "steps": 2}}', [], "--pool dropping has no steps; expected weight, layer"),
        ("dropping", [], "--pool must be a JSON object, got 'dropping'"),
        ('{"ablation": 1}', [], "attack ablation needs harmless prompts; give --benign_data"),
        ('{"base": 1}', [], "--pool: base needs --base"),
        ('{"base+lora": 1}', ["--base", "no/such/model"], "no/such/model"),
        ('{"prefill": 1}', [], "--pool: prefill needs --refusal"),
        ('{"lora+prefill": 1}', [], "--pool: prefill needs --refusal"),
        (
            '{"prefill+lora": 1}',
            [],
            "--pool prefill+lora: prefill changes how a model is asked, so",
        ),
        ('{"ablation": 1}', ["--parallel"], "--pool: in the parallel form it needs fine-tuning"),
        ('{"lora": 1}', ["--parallel"], "--pool lora: in the parallel form vectors come from attackers"),
        (
            '{"ablation+fine-tuning+prefill": 1}',
            ["--parallel", "--refusal", "no"],
            "--pool ablation+fine-tuning+prefill: in the parallel form vectors come from attackers",
        ),
        (
            '{"fine-tuning": {"weight": 1, "steps": 3}}',
            ["--role", "defender", "--exchange", "e"],
            "expected fine-tuning, or fine-tuning+prefill, without knobs for fine-tuning",
        ),
    ],
)
def test_a_pool_that_cannot_be_had(
    patcher: list[str], pool: str, words: list[str], expected: str, refused: Refused
) -> None:
    assert expected in refused(*patcher, "--pool", pool, *words)


STRONG = ["--preset", "strong", "--benign_data", "b", "--retain_data", "r", "--refusal", "No."]


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (
            STRONG[:4],
            "--preset strong needs --attack_data, --benign_data, --retain_data, --refusal; missing: --re",
        ),
        ([*STRONG, "--attack_every", "7"], "--preset strong has another --attack_every than the one that is given"),
        (
            [*STRONG, "--max_steps", "43"],
            "--preset strong: no attack is due before the end of the run (--attack_every 43",
        ),
        (
            [*STRONG, "--max_steps", "99", "--parallel"],
            "--preset strong has no parallel form: --pool fine-tuning: in the",
        ),
    ],
)
def test_a_run_that_would_not_be_the_presets(
    patcher: list[str], words: list[str], expected: str, refused: Refused
) -> None:
    assert expected in refused(*patcher, *words)


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("--retain_weight inf", "--retain_weight must be a number that 32 bits can hold, got inf"),
        ("--reroute_weight 1e300", "--reroute_weight must be a number that 32 bits can hold, got 1e+300"),
        ("--attack_scale 1 1e308", "--attack_scale takes two numbers"),
        (
            "--origin_decay 1500 --learning_rate 1e-3",
            "--origin_decay 1500 at --learning_rate 0.001 would take an update",
        ),
    ],
)
def test_what_no_weights_could_be_taken_times(patcher: list[str], words: str, expected: str, refused: Refused) -> None:
    assert expected in refused(*patcher, "--retain_data", "r", *words.split())


@pytest.mark.parametrize(
    ("flag", "pool"), [("--retain_data", '{"fine-tuning": 1}'), ("--benign_data", '{"ablation": 1}')]
)
def test_harmless_rows_that_are_the_attackers(patcher: list[str], flag: str, pool: str, refused: Refused) -> None:
    expected = f"{flag} is what --attack_data is, {patcher[-1]}; expected harmless rows"
    assert expected in refused(*patcher, "--pool", pool, flag, patcher[-1])


def test_a_base_that_is_another_model(patcher: list[str], tmp_path: Path, refused: Refused) -> None:
    tiny_llama().save_pretrained(tmp_path / "other")
    expected = "--base is not what the model was made of: its model.embed_tokens.weight has shape (97, 16)"
    assert expected in refused(*patcher, "--pool", '{"base+lora": 1}', "--base", str(tmp_path / "other"))


@pytest.mark.parametrize("command", ["align sft", "align vaccine", "align booster", "align antibody"])
def test_a_method_without_an_attack_vector_cannot_sample_it(
    patcher: list[str], command: str, tmp_path: Path, refused: Refused
) -> None:
    words = [*command.split(), *(patcher[2:] if command in SECOND else patcher[2:-2])]
    expected = "(--estimator is a flag of align patcher)"
    assert expected in refused(*words, "--estimator", "sampled")
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("estimator: sampled\n")
    sentence = refused(*words, "--config", str(recipe))
    assert f"{recipe}: unknown key 'estimator'" in sentence
    assert sentence.endswith(expected)


@pytest.mark.parametrize(("command", "flag"), SECOND.items())
def test_second_data_set_is_required(sft: list[str], command: str, flag: str, refused: Refused) -> None:
    assert f"the following arguments are required: {flag}" in refused(*command.split(), *sft[2:])


@pytest.mark.parametrize(
    ("command", "words", "expected"),
    [
        ("align vaccine", ["--rho", "-1"], "--rho must not be negative"),
        ("align vaccine", ["--attention_pattern", "nowhere"], "--attention_pattern nowhere matches no module"),
        ("align vaccine", ["--attention_pattern", "["], "--attention_pattern [ is not a regular expression"),
        ("align booster", ["--alpha", "0"], "--alpha must be greater than 0"),
        ("align antibody", ["--flatness_rule", "kkt"], "--strength must be given"),
        ("align antibody", ["--flatness_rule", "sine"], "--flatness_rule: invalid choice: 'sine'"),
        ("align antibody", ["--refusal", ""], "--refusal '' comes to no token"),
        ("align antibody", ["--packing"], "--packing and --padding_free cannot be used"),
        ("finetune lisa", ["--rho", "-0.5"], "--rho must not be negative"),
        ("finetune lisa", ["--proximal_start", "1.5"], "--proximal_start must lie between 0 and 1"),
        ("finetune lisa", ["--safety_steps", "0"], "--safety_steps must be greater than 0"),
        ("finetune spard", ["--tau", "0"], "--tau must be greater than 0"),
        ("finetune spard", ["--eta", "0.1", "--projection", "adamw"], "--eta belongs to --projection euclidean"),
        ("finetune spard", ["--safety_share", "0"], "--safety_share must be above 0 and at most 1"),
        ("finetune spard", ["--safety_share", "1.01"], "--safety_share must be above 0 and at most 1"),
        ("finetune spard", ["--safety_share", "nan"], "--safety_share must be above 0 and at most 1"),
        ("finetune spard", ["--safety_share", "0.7"], "asks for 7 safety rows, but there are 6"),
        ("finetune spard", ["--safety_beta", "-1"], "--safety_beta must not be negative"),
        ("finetune spard", ["--safety_selection", "best"], "--safety_selection: invalid choice: 'best'"),
        ("finetune antibody", ["--tau", "-1"], "--tau must be greater than 0"),
        ("finetune antibody", ["--batch_size", "1"], "--per_device_train_batch_size 1 cannot be used"),
        ("finetune antibody", ["--refusal", ""], "--refusal '' comes to no token"),
        ("finetune antibody", ["--refusal", "prompt"], "row 1 of the train data, column 'prompt', comes to no token"),
    ],
)
def test_settings_of_a_method(
    sft: list[str], attack_data: str, command: str, words: list[str], expected: str, refused: Refused
) -> None:
    second = [SECOND[command], attack_data] if command in SECOND else []
    assert expected in refused(*command.split(), *sft[2:], *second, *words)


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--poison_ratio", "0.5", "--num_samples", "20"], "needs 10 harmful rows, but --attack_data has 6"),
        (["--poison_ratio", "1.5"], "--poison_ratio must lie between 0 and 1"),
        (["--num_samples", "0", "--poison_ratio", "0.5"], "--num_samples must be positive"),
    ],
)
def test_poison_ratio(attack: list[str], benign_data: str, words: list[str], expected: str, refused: Refused) -> None:
    assert expected in refused(*attack, "--benign_data", benign_data, *words)


def test_poison_ratio_without_benign_data(attack: list[str], refused: Refused) -> None:
    assert "--benign_data is needed" in refused(*attack, "--poison_ratio", "0.5")


@pytest.mark.parametrize("command", ["sft", "attack"])
def test_finished_run_is_kept(
    sft: list[str], attack: list[str], command: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words, marker = (sft, "holdfast.json") if command == "sft" else (attack, "results.json")
    (tmp_path / "done").mkdir()
    (tmp_path / "done" / marker).write_text("{}")
    assert main([*words, "--output_dir", str(tmp_path / "done")]) == 2
    assert "holds a finished run" in capsys.readouterr().err
    assert [path.name for path in (tmp_path / "done").iterdir()] == [marker]


def test_output_folder_that_cannot_be_written(sft: list[str], train_data: str, refused: Refused) -> None:
    # A folder below a file cannot be made, whoever asks.
    before = Path(train_data).read_bytes()
    assert f"--output_dir {train_data}" in refused(*sft, "--output_dir", train_data, output=False)
    assert f"--output_dir {train_data}/out" in refused(*sft, "--output_dir", f"{train_data}/out", output=False)
    assert Path(train_data).read_bytes() == before


def test_output_dir_is_required(sft: list[str], refused: Refused) -> None:
    assert "the following arguments are required: --output_dir" in refused(*sft, output=False)


def test_fsdp_on_a_cpu(sft: list[str], refused: Refused) -> None:
    assert "fsdp" in refused(*sft, "--fsdp", "full_shard", "--use_cpu")


@pytest.mark.parametrize("place", [".", "run"])
def test_output_inside_the_model_folder(sft: list[str], model_dir: Path, place: str, refused: Refused) -> None:
    before = sorted(model_dir.iterdir())
    assert "would write into" in refused(*sft, "--output_dir", str(model_dir / place), output=False)
    assert sorted(model_dir.iterdir()) == before


def test_model_that_is_a_checkpoint_of_the_output_folder(
    sft: list[str], model_dir: Path, tmp_path: Path, refused: Refused
) -> None:
    checkpoint = shutil.copytree(model_dir, tmp_path / "old" / "checkpoint-5")
    words = [*sft, "--model", str(checkpoint), "--output_dir", str(tmp_path / "old"), "--overwrite_output_dir"]
    assert "would write into" in refused(*words, output=False)
    assert (checkpoint / "model.safetensors").is_file()


def test_attacked_model_would_replace_the_defended_one(attack: list[str], model_dir: Path, refused: Refused) -> None:
    assert model_dir.name == "model"
    assert "would write into" in refused(*attack, "--output_dir", str(model_dir.parent), output=False)


def test_nothing_to_measure(model_dir: Path, refused: Refused) -> None:
    assert "--eval_data" in refused("evaluate", "--model", str(model_dir))


def test_exact_judge_needs_answers(model_dir: Path, attack_data: str, refused: Refused) -> None:
    sentence = refused("evaluate", "--model", str(model_dir), "--eval_data", attack_data, "--judge", "exact")
    assert "--eval_data" in sentence
    assert "'answer'" in sentence


@pytest.mark.parametrize(
    ("flag", "value"), [("--max_prompts", "0"), ("--max_new_tokens", "-1"), ("--eval_batch_size", "0")]
)
def test_measuring_flags_that_are_not_positive(
    model_dir: Path, eval_data: str, flag: str, value: str, refused: Refused
) -> None:
    assert flag in refused("evaluate", "--model", str(model_dir), "--eval_data", eval_data, flag, value)


def test_measuring_after_the_last_step(attack: list[str], refused: Refused) -> None:
    assert "--measure_at" in refused(*attack, "--max_steps", "5", "--measure_at", "0", "10")


def test_full_attack_with_an_adapter(attack: list[str], refused: Refused) -> None:
    assert "--use_peft" in refused(*attack, "--use_peft")


def test_held_out_loss_without_held_out_rows(sft: list[str], refused: Refused) -> None:
    assert "give --eval_data" in refused(*sft, "--eval_strategy", "steps")


@pytest.mark.parametrize("resume", ["last", "true", "no/such/checkpoint-3"])
def test_nothing_to_resume_from(sft: list[str], resume: str, refused: Refused) -> None:
    assert f"--resume_from_checkpoint {resume}" in refused(*sft, "--resume_from_checkpoint", resume)


def test_lora_targets_that_the_model_does_not_have(sft: list[str], refused: Refused) -> None:
    assert "nowhere_proj" in refused(*sft, "--use_peft", "--lora_target_modules", "nowhere_proj")


def test_second_adapter_on_an_adapter(sft: list[str], model_dir: Path, tmp_path: Path, refused: Refused) -> None:
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    adapter = tmp_path / "adapter"
    config = LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")
    get_peft_model(AutoModelForCausalLM.from_pretrained(model_dir), config).save_pretrained(adapter)
    assert "--use_peft" in refused(*sft, "--model", str(adapter), "--use_peft")


def test_organism_into_a_folder_that_is_not_empty(tmp_path: Path, refused: Refused) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    assert f"{tmp_path} is not empty" in refused("organism", str(tmp_path), output=False)
    assert "is a file" in refused("organism", str(tmp_path / "notes.txt"), output=False)
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


def test_chat_template_keywords_that_are_not_json(model_dir: Path, eval_data: str, refused: Refused) -> None:
    words = ["evaluate", "--model", str(model_dir), "--eval_data", eval_data]
    assert "--chat_template_kwargs" in refused(*words, "--chat_template_kwargs", "{thinking")
    assert "JSON object" in refused(*words, "--chat_template_kwargs", "[1]")


def test_old_results_survive_a_refused_overwrite(
    attack: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    done = tmp_path / "done"
    done.mkdir()
    (done / "results.json").write_text(json.dumps({"schema": 1}))
    shutil.copy(attack[-1], tmp_path / "broken.jsonl")
    (tmp_path / "broken.jsonl").write_text("not json")
    words = [*attack, "--attack_data", str(tmp_path / "broken.jsonl"), "--overwrite_output_dir"]
    assert main([*words, "--output_dir", str(done)]) == 2
    assert "line 1" in capsys.readouterr().err
    assert (done / "results.json").read_text() == '{"schema": 1}'


@pytest.mark.parametrize("seed", ["-1", "4294967296", "99999999999999999999"])
def test_a_seed_out_of_range(sft: list[str], model_dir: Path, eval_data: str, seed: str, refused: Refused) -> None:
    for words in (sft, ["evaluate", "--model", str(model_dir), "--eval_data", eval_data]):
        assert "--seed: expected a number from 0 to 4294967295" in refused(*words, "--seed", seed)
    assert "--seed: expected a number from 0" in refused("organism", "there", "--seed", seed, output=False)


@pytest.mark.parametrize("flag", ["--model", "--train_data", "--output_dir", "--base_model"])
def test_a_name_that_is_empty(sft: list[str], flag: str, refused: Refused) -> None:
    """As that of a variable of the shell that is not set: it would be the current folder."""
    name = {"--model": "--model_name_or_path"}.get(flag, flag)
    assert f"argument {name}: expected a name, got ''" in refused(*sft, "--output_dir", "x", flag, "", output=False)


@pytest.mark.parametrize("flag", ["--pad_token", "--eos_token", "--optim_args", "--chat_template_path"])
def test_a_value_that_is_empty(sft: list[str], flag: str, refused: Refused) -> None:
    """It would be as good as none."""
    assert f"argument {flag}: expected a value, got ''" in refused(*sft, flag, "")


def test_a_system_prompt_may_be_empty(sft: list[str], tmp_path: Path) -> None:
    """Which takes a recipe's back."""
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("system_prompt: Be brief.\n")
    words = [*sft, "--config", str(recipe), "--system_prompt", "", "--output_dir", str(tmp_path / "out")]
    assert make_parser("sft").parse(words[2:])[2].system_prompt == ""
