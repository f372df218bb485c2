"""What libraries refuse, and what the machine cannot do, is one sentence at the command line: never a traceback."""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase

from helpers import files_no_longer_than
from holdfast.checkpoint import is_complete
from holdfast.cli import main
from holdfast.trainer import DefenseTrainer

Refused = Callable[..., str]

# PEFT looks for the base model that an adapter names, to see whether its embeddings are larger now.
pytestmark = pytest.mark.filterwarnings("ignore:Could not find a config file")

QUICK = ("--max_steps", "2", "--batch_size", "2", "--gradient_checkpointing", "false")


@pytest.fixture
def words(model_dir: Path, train_data: str, attack_data: str, eval_data: str) -> dict[str, list[str]]:
    model = ["--model", str(model_dir)]
    return {
        "align": ["align", "sft", *model, "--train_data", train_data, *QUICK],
        "finetune": ["finetune", "sft", *model, "--train_data", train_data, *QUICK],
        "attack": ["attack", "full", *model, "--attack_data", attack_data, *QUICK],
        "repair": ["repair", "antidote", *model, "--attack_data", attack_data],
        "audit": ["audit", *model, "--data", train_data],
        "evaluate": ["evaluate", *model, "--max_new_tokens", "4", "--eval_data", eval_data],
    }


ALL = ("align", "finetune", "attack", "repair", "audit", "evaluate")

REFUSED = [
    ("align", "--report_to wandb", "--report_to wandb: WandbCallback requires wandb to be installed"),
    ("attack", "--report_to trackio", "--report_to trackio: TrackioCallback requires trackio to be installed"),
    ("align", "--report_to tensorboard", "--report_to tensorboard: TensorBoardCallback requires tensorboard"),
    ("align", "--report_to paper", "--report_to paper: paper is not supported, only"),
    ("align", "--use_liger_kernel", "--use_liger_kernel needs the package liger-kernel"),
    ("align", "--optimizer adamw_8bit", "--optim adamw_8bit: You need to install `bitsandbytes`"),
    ("attack", "--optimizer paged_adamw_8bit", "--optim paged_adamw_8bit: You need to install `bitsandbytes`"),
    ("finetune", "--optimizer galore_adamw", "--optim galore_adamw: You need to install `galore_torch`"),
    ("align", "--optimizer lomo", "--optim lomo cannot be used: it updates the weights inside the backward pass"),
    ("align", "--optimizer galore_adamw_layerwise", "--optim galore_adamw_layerwise cannot be used"),
    ("align", "--optimizer sgd --optim_args eight", "--optim sgd --optim_args eight: not enough values"),
    ("attack", "--optim_args foo=1", "--optim_args plays no part in an optimizer that takes no arguments"),
    (
        "align",
        "--optimizer sgd --optim_args nesterov=false,momentum=0.9,foo=1",
        "--optim_args foo=1 plays no part in --optim sgd, which has no such argument",
    ),
    ("align", "--adam_beta1 2", "--optim adamw_torch_fused: Invalid beta parameter"),
    ("align", "--scheduler cosine_with_min_lr", "--lr_scheduler_type cosine_with_min_lr: One of min_lr or"),
    (
        "attack",
        "--scheduler warmup_stable_decay",
        "--lr_scheduler_type warmup_stable_decay: get_wsd_schedule() missing",
    ),
    ("align", '--scheduler cosine --lr_scheduler_kwargs {"cycles":2}', "--lr_scheduler_kwargs {'cycles': 2}: "),
    ("align", "--scheduler reduce_lr_on_plateau", "lr_scheduler_type reduce_lr_on_plateau requires an eval strategy"),
    ("align", '--accelerator_config {"foo":1}', "got an unexpected keyword argument 'foo'"),
    ("align", "--accelerator_config nope.json", "--accelerator_config nope.json cannot be read (No such file"),
    ("align", "--fsdp full_shard --fsdp_config nope.json", "--fsdp_config nope.json cannot be read (No such file"),
    ("align", "--fsdp_config nope.json", "--fsdp_config plays no part without --fsdp"),
    ("align", "--deepspeed nope.json", "--deepspeed cannot be used"),
    ("finetune", "--model_revision v2", "--model_revision v2: "),
    ("align", "--model_init_kwargs [1]", "--model_init_kwargs must be a JSON object, got '[1]'"),
    ("align", '--gradient_checkpointing_kwargs {"foo":1}', "--activation_checkpointing_kwargs has no foo; it takes"),
    ("align", "--activation_offloading", "--activation_offloading needs an accelerator"),
    ("align", "--torch_compile_mode nonsense", "Unrecognized mode=nonsense, should be one of"),
    ("align", "--weight_decay -1", "--weight_decay must not be negative, got -1.0"),
    ("align", "--max_grad_norm -1", "--max_grad_norm must not be negative, got -1.0"),
    ("align", "--neftune_noise_alpha -1", "--neftune_noise_alpha must not be negative, got -1.0"),
    ("align", "--dataloader_num_workers -1", "--dataloader_num_workers must not be negative, got -1"),
    ("align", "--dataloader_prefetch_factor 0", "--dataloader_prefetch_factor must be greater than 0, got 0"),
    ("align", "--pad_to_multiple_of 0", "--pad_to_multiple_of must be greater than 0, got 0"),
    ("align", "--use_peft --lora_task_type NONSENSE", "Invalid task type: 'NONSENSE'"),
    ("align", "--use_peft --lora_r 0", "--lora_r should be a positive integer value but the value passed is 0"),
    ("align", "--use_peft --lora_target_modules (", "missing ), unterminated subpattern"),
    ("align", "--load_in_4bit --bnb_4bit_quant_storage x", "`bnb_4bit_quant_storage` must be a valid string"),
    ("align", "--per_device_eval_batch_size 0", "--per_device_eval_batch_size must be greater than 0, got 0"),
    ("align", "--base_model some/where", "--base_model some/where: "),
    ("align", "--load_in_4bit", "cannot be loaded with --load_in_4bit (Using `bitsandbytes` 4-bit"),
    ("attack", "--load_in_8bit", "cannot be loaded with --load_in_8bit (Using `bitsandbytes` 8-bit"),
    ("align", "--eos_token <nope>", "--eos_token ('<nope>') is not found in the vocabulary"),
    ("attack", "--pad_token <nope>", "--pad_token ('<nope>') is not found in the vocabulary"),
    *(
        (command, "--attn_implementation flash_attention_2", "with --attn_implementation flash_attention_2 (")
        for command in ALL
    ),
    *((command, r"--model C:\models\mine", r"model C:\models\mine is neither a folder nor") for command in ALL),
]


@pytest.mark.parametrize(("command", "flags", "expected"), REFUSED, ids=lambda value: value.split(":")[0][:40])
def test_what_a_library_refuses(
    words: dict[str, list[str]], command: str, flags: str, expected: str, refused: Refused
) -> None:
    assert expected in refused(*words[command], *flags.split(" "))


def test_a_reporter_without_its_key(
    words: dict[str, list[str]], monkeypatch: pytest.MonkeyPatch, refused: Refused
) -> None:
    """It says so when training begins, in a way of its own."""

    def init(**_: object) -> None:
        raise RuntimeError("No API key configured. Use `wandb login` to log in.")

    monkeypatch.setattr("transformers.integrations.integration_utils.is_wandb_available", lambda: True)
    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(run=None, init=init))
    monkeypatch.setitem(sys.modules, "wandb.sdk.lib.config_util", SimpleNamespace(ConfigError=KeyError))
    sentence = refused(*words["align"], "--report_to", "wandb")
    assert sentence == "holdfast: --report_to wandb: No API key configured. Use `wandb login` to log in"


def failed(argv: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    assert main(argv) == 1
    shown = capsys.readouterr().err
    assert "Traceback" not in shown
    return shown.splitlines()[-1]


@pytest.mark.parametrize(
    ("size", "why"), [(20_000, "File too large"), (90_000, "a checkpoint could not be written to its end")]
)
def test_a_full_disk_during_training(
    words: dict[str, list[str]], size: int, why: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Weights are written by safetensors, the optimizer's state by torch: each has its own way of saying it."""
    out = tmp_path / "out"
    saving = ["--output_dir", str(out), "--save_strategy", "steps", "--save_steps", "1", "--max_steps", "1"]
    with files_no_longer_than(size):
        sentence = failed([*words["align"], *saving], capsys)
    assert why in sentence
    assert "no checkpoint had been written yet" in sentence
    assert not (out / "_unfinished").exists()  # no room is taken by what is of no use
    assert main([*words["align"], *saving]) == 0
    with files_no_longer_than(size):
        sentence = failed(
            [*words["align"], *saving[:-1], "2", "--overwrite_output_dir", "--resume_from_checkpoint", "last"], capsys
        )
    assert f"the last good checkpoint is {out / 'checkpoint-1'}" in sentence
    assert is_complete(out / "checkpoint-1")


@pytest.mark.parametrize("command", ["align", "attack", "repair"])
def test_a_full_disk_when_the_result_is_written(
    words: dict[str, list[str]], command: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    quiet = ["--save_strategy", "no"] if command == "align" else []
    with files_no_longer_than(20_000):
        sentence = failed([*words[command], *quiet, "--output_dir", str(tmp_path / "out")], capsys)
    assert "weights could not be written or read (Error while serializing: I/O error: File too large" in sentence
    assert not (tmp_path / "out" / ("results.json" if command == "attack" else "holdfast.json")).exists()


def test_memory_that_does_not_suffice(
    words: dict[str, list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def too_large(*_: object) -> None:
        torch.empty(2**60)

    monkeypatch.setattr(DefenseTrainer, "defended_gradient", too_large)
    sentence = failed([*words["align"], "--output_dir", str(tmp_path / "out")], capsys)
    assert "out of memory" in sentence
    assert "no checkpoint had been written yet" in sentence


def test_a_fault_of_our_own_keeps_its_traceback(
    words: dict[str, list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def faulty(*_: object) -> None:
        raise ValueError("a bug")

    monkeypatch.setattr(DefenseTrainer, "defended_gradient", faulty)
    with pytest.raises(ValueError, match="a bug"):
        main([*words["align"], "--output_dir", str(tmp_path / "out")])


@pytest.mark.parametrize("targets", ["q_proj", "q_proj v_proj", ".*q_proj", "all-linear"])
def test_one_target_of_an_adapter_is_a_name_as_several_are(
    words: dict[str, list[str]], targets: str, tmp_path: Path
) -> None:
    adapted = [*words["align"], "--use_peft", "--lora_target_modules", *targets.split(" ")]
    assert main([*adapted, "--output_dir", str(tmp_path / "out")]) == 0
    tensors = load_file(tmp_path / "out" / "adapter_model.safetensors")
    assert any(".q_proj." in name for name in tensors)


@pytest.fixture
def adapter(model_dir: Path, tmp_path: Path) -> Path:
    """An adapter whose base model has moved."""
    base = AutoModelForCausalLM.from_pretrained(model_dir)
    adapted = get_peft_model(base, LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM"))
    adapted.peft_config["default"].base_model_name_or_path = str(tmp_path / "gone")
    adapted.save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter"


@pytest.mark.parametrize("command", ALL)
def test_an_adapter_whose_base_is_gone(
    words: dict[str, list[str]], command: str, adapter: Path, model_dir: Path, tmp_path: Path, refused: Refused
) -> None:
    adapted = [*words[command], "--model", str(adapter)]
    sentence = refused(*adapted)
    assert f"adapter {adapter}: its base model {tmp_path / 'gone'} is neither a folder nor" in sentence
    assert sentence.endswith("name it with --base_model")
    out = tmp_path / "out"
    assert main([*adapted, "--base_model", str(model_dir), "--output_dir", str(out)]) == 0
    if command in ("align", "finetune", "repair"):  # what is saved goes on standing where it stood now
        saved = json.loads((out / "adapter_config.json").read_text(encoding="utf-8"))
        assert saved["base_model_name_or_path"] == str(model_dir)


@pytest.mark.parametrize("command", ["align", "repair"])
def test_an_adapter_is_not_written_into_its_base(
    words: dict[str, list[str]], command: str, adapter: Path, model_dir: Path, refused: Refused
) -> None:
    adapted = [*words[command], "--model", str(adapter), "--base_model", str(model_dir)]
    assert "would write into" in refused(*adapted, "--output_dir", str(model_dir), output=False)
    assert not list(model_dir.glob("adapter*"))


EXTRA = "<soft_token>"


@pytest.fixture
def with_extra_token(model_dir: Path) -> PreTrainedTokenizerBase:
    """The model's tokenizer, which now has a token more than the model knows, as that of some Gemma 3 has."""
    tokenizer = AutoTokenizer.from_pretrained(model_dir)
    tokenizer.add_tokens([EXTRA], special_tokens=True)
    tokenizer.save_pretrained(model_dir)
    return tokenizer


@pytest.mark.parametrize("command", ALL)
def test_a_token_that_the_model_does_not_know(
    words: dict[str, list[str]],
    command: str,
    with_extra_token: PreTrainedTokenizerBase,
    write_rows: Callable[..., str],
    tmp_path: Path,
    refused: Refused,
) -> None:
    """It is refused where it occurs, and there alone."""
    flag, row = ("--eval_data", "prompt 2") if command == "evaluate" else (words[command][-2], "row 2 of")
    if flag == "--gradient_checkpointing":
        flag = "--attack_data" if command == "attack" else "--train_data"
    rows = [{"prompt": f"How do I make {thing}?", "response": "No."} for thing in ("rust", EXTRA)]
    sentence = refused(*words[command], flag, write_rows("extra.jsonl", rows))
    token = with_extra_token.convert_tokens_to_ids(EXTRA)
    assert f"{row} " in sentence
    assert f"has the token {token}, but the model's vocabulary has {token} entries" in sentence
    assert main([*words[command], "--output_dir", str(tmp_path / "out")]) == 0


@pytest.mark.parametrize("command", ALL)
def test_a_padding_token_that_the_model_does_not_know(
    words: dict[str, list[str]],
    command: str,
    with_extra_token: PreTrainedTokenizerBase,
    model_dir: Path,
    tmp_path: Path,
    refused: Refused,
) -> None:
    with_extra_token.pad_token = EXTRA
    with_extra_token.save_pretrained(model_dir)
    if command in ("repair", "evaluate"):  # nothing is learnt, and any token pads
        assert main([*words[command], "--output_dir", str(tmp_path / "out")]) == 0
        return
    assert f"the padding token {EXTRA!r} is number" in refused(*words[command])
    if command != "audit":
        words[command] += ["--pad_token", "<|endoftext|>"]
        assert main([*words[command], "--output_dir", str(tmp_path / "out")]) == 0


@pytest.mark.parametrize("command", ALL)
def test_an_adapter_on_a_base_with_a_smaller_vocabulary(
    words: dict[str, list[str]], command: str, adapter: Path, model_dir: Path, refused: Refused
) -> None:
    AutoTokenizer.from_pretrained(model_dir).save_pretrained(adapter)
    smaller = AutoModelForCausalLM.from_pretrained(model_dir)
    smaller.resize_token_embeddings(300)
    smaller.save_pretrained(model_dir)
    sentence = refused(*words[command], "--model", str(adapter), "--base_model", str(model_dir))
    assert "but the model's vocabulary has 300 entries" in sentence
