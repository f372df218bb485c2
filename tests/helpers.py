"""Small models, tokenizers and rows that the tests of the core share."""

from __future__ import annotations

import json
import random
import resource
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from safetensors.torch import load_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    TrainerCallback,
)

GOLDEN = Path(__file__).parent / "golden"
WORDS = 97  # the golden model's vocabulary


def golden_model() -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(GOLDEN / "model")


def golden_vector(name: str) -> dict[str, torch.Tensor]:
    return load_file(GOLDEN / f"{name}.safetensors")


def golden_batch(name: str, file: str = "batches") -> dict[str, torch.Tensor]:
    tensors = load_file(GOLDEN / f"{file}.safetensors")
    return {key.partition(".")[2]: tensor for key, tensor in tensors.items() if key.startswith(f"{name}.")}


def golden_case(name: str) -> dict[str, Any]:
    """The settings and numbers of a golden case."""
    return json.loads((GOLDEN / "golden.json").read_text(encoding="utf-8"))[name]


def golden_refusals(name: str = "harmful", refusal: str = "refusal") -> dict[str, torch.Tensor]:
    """A golden batch with its refusal view."""
    view = {f"refusal_{key}": tensor for key, tensor in golden_batch(refusal).items()}
    batch = golden_batch(name)
    return {**batch, **view, "refusal_row": torch.arange(1, len(batch["labels"]) + 1)}


def read_json(path: Path) -> dict[str, Any]:
    content = json.loads(path.read_text(encoding="utf-8"))
    assert isinstance(content, dict)
    return content


def read_lines(path: Path) -> list[dict[str, Any]]:
    with path.open(encoding="utf-8") as lines:  # unlike splitlines, at line feeds alone
        return [json.loads(line) for line in lines]


@contextmanager
def files_no_longer_than(size: int) -> Iterator[None]:
    """As on a full disk: what is written beyond that fails."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def rows_of(batch: dict[str, torch.Tensor]) -> list[tuple[int, ...]]:
    """The tokens of every row, without padding."""
    rows = zip(batch["input_ids"], batch["attention_mask"], strict=True)
    return [tuple(ids[mask.bool()].tolist()) for ids, mask in rows]


def golden_rows(name: str, file: str = "batches") -> Dataset:
    """The rows of a golden batch, tokenised and without their padding."""
    batch = golden_batch(name, file)
    lengths = batch["attention_mask"].sum(1).tolist()
    return Dataset.from_list(
        [
            {"input_ids": ids[:length].tolist(), "labels": labels[:length].tolist()}
            for ids, labels, length in zip(batch["input_ids"], batch["labels"], lengths, strict=True)
        ]
    )


def word_tokenizer() -> PreTrainedTokenizerFast:
    """t0 … t96: padding, beginning, end, unknown, and words."""
    words = {f"t{i}": i for i in range(WORDS)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="t3"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="t0", bos_token="t1", eos_token="t2", unk_token="t3"
    )


def word_rows(count: int, seed: int = 0) -> Dataset:
    """Plain prompts and completions of different lengths."""
    draw = random.Random(seed)
    text = lambda low, high: " ".join(f"t{draw.randrange(4, WORDS)}" for _ in range(draw.randint(low, high)))  # noqa: E731
    return Dataset.from_list([{"prompt": text(2, 5) + " ", "completion": text(1, 6)} for _ in range(count)])


def tiny_llama(seed: int = 0, **changes: object) -> LlamaForCausalLM:
    """About 6 000 parameters over the vocabulary of `word_tokenizer`."""
    settings: dict[str, object] = {
        "vocab_size": WORDS,
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 128,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "initializer_range": 0.2,
    }
    torch.manual_seed(seed)
    return LlamaForCausalLM(LlamaConfig(**{**settings, **changes}))


CHAT_TOKENS = {
    "qwen": ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<think>", "</think>"],
    "llama": ["<|end_of_text|>", "<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"],
}


def chat_tokenizer(template: str | None, family: str = "qwen", *, think_tokens: bool = True) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer trained on the spot, with the special tokens of a family of chat models.

    `think_tokens`: whether <think> and </think> are among them, or text like any other.
    """
    special = [token for token in CHAT_TOKENS[family] if think_tokens or "think" not in token]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    corpus = ["user assistant system You are a helpful assistant. How does one bake bread? With flour and water."] * 4
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(corpus, trainer)
    end = "<|im_end|>" if family == "qwen" else "<|eot_id|>"
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=special[0],
        eos_token=end,
        bos_token="<|begin_of_text|>" if family == "llama" else None,
        chat_template=template,
    )


def one_word_model(folder: Path, word: str, template: str | None = None) -> str:
    """A model that says one word over and over: with its last norm at zero all logits are equal, and the first wins."""
    words = [word, "<s>", "</s>", "<unk>", *["How", "?", "a", "b", "Grade", ":", "Question", "Answer", "x"]]
    tokenizer = Tokenizer(models.WordLevel({text: place for place, text in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>", pad_token="<unk>"
    )
    wrapped.chat_template = template
    model = tiny_llama(vocab_size=len(words), pad_token_id=3)
    model.model.norm.weight.data.zero_()
    model.save_pretrained(folder)
    wrapped.save_pretrained(folder)
    return str(folder)


class Gradients(TrainerCallback):
    """Notes a copy of every gradient that the optimizer is given, by parameter name."""

    def __init__(self) -> None:
        self.seen: list[dict[str, torch.Tensor]] = []

    def on_pre_optimizer_step(self, args, state, control, *, model, **_):
        self.seen.append(
            {name.removeprefix("module."): p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}
        )


class Weights(TrainerCallback):
    """Notes the weights after every update."""

    def __init__(self) -> None:
        self.seen: list[dict[str, torch.Tensor]] = []

    def on_step_end(self, args, state, control, *, model, **_):
        self.seen.append(weights(model))


def logged_updates(trainer) -> list[dict[str, float]]:
    """What a run has logged, by update."""
    return [entry for entry in trainer.state.log_history if "loss" in entry]


def gradients(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.grad for name, p in model.named_parameters() if p.requires_grad}


def weights(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def worst_entry(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> float:
    """The largest deviation of an entry, as a share of the largest entry."""
    assert found.keys() == expected.keys()
    largest = max(t.abs().max().item() for t in expected.values())
    return max((found[name] - t).abs().max().item() for name, t in expected.items()) / largest


def relative_distance(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> float:
    assert found.keys() == expected.keys()
    difference = sum((found[name].double() - t.double()).square().sum() for name, t in expected.items())
    return (difference / sum(t.double().square().sum() for t in expected.values())).sqrt().item()


def same_bits(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name].detach(), b[name].detach()) for name in a)


_SGD = {"optimizer": "sgd", "learning_rate": {"low": 0.01, "high": 0.1, "log": True}}
PATCHERS: dict[str, dict[str, Any]] = {
    "patcher": {},
    "sampled": {"estimator": "sampled", "attack_scale": [0.3, 1.5]},
    "retaining": {"estimator": "sampled", "retain_weight": 1.0},
    "rerouting": {
        **{"estimator": "sampled", "retain_weight": 2.0, "retain_alpha": 0.5, "origin_decay": 30.0},
        "reroute_weight": 2.0,  # with seed 3 seven updates take every term
    },
    "pool": {
        "attack_every": 1,
        "attack_scale": [0.3, 1.5],
        "refusal": "t5 t6 t7",
        "pool": {
            "ablation": {"weight": 2, "prompts": 4},
            "dropping": 1,
            "prefill": 1,
            "dropping+ablation": 1,
            "dropping+prefill": 1,
        },
    },
    "pool of vectors": {
        "attack_every": 1,
        "refusal": "t5 t6 t7",
        "pool": {
            "fine-tuning": {"weight": 1, "rounds": 2, "steps": [2, 3], "rows": [2, 4], **_SGD},
            "lora": {"weight": 1, "lora_rank": 2, "steps": 2, **_SGD},
            "ablation+fine-tuning": {"weight": 1, "ablation": {"layer": -1}, "fine-tuning": {"steps": 2, **_SGD}},
            "fine-tuning+prefill": {"weight": 1, "rounds": 2, "fine-tuning": {"steps": 2, **_SGD}},
        },
    },
}
"""Patcher's forms, with what sets each apart."""


def run_to_resume(method: str, output_dir: str, callbacks: Sequence[TrainerCallback] = (), **changes: object):
    """A short run with everything whose state a checkpoint must hold: dropout, a schedule, windows unlike in size.

    Checkpoints after every second update, simulated attacks after every third: some checkpoints come with a vector in
    force, some right before an attack.
    """
    from holdfast.alignment.patcher import PatcherTrainer
    from holdfast.alignment.patcher_config import PatcherConfig
    from holdfast.config import DefenseConfig
    from holdfast.trainer import DefenseTrainer

    settings: dict[str, object] = {
        "output_dir": output_dir,
        "report_to": "none",
        "disable_tqdm": True,
        "logging_steps": 1,
        "save_strategy": "steps",
        "save_steps": 2,
        "max_steps": 7,
        "per_device_train_batch_size": 3,
        "gradient_accumulation_steps": 2,
        "learning_rate": 1e-3,
        "lr_scheduler_type": "cosine",
        "warmup_steps": 2,
        "max_length": 64,
        "seed": 3,
        **changes,
    }
    model = tiny_llama(attention_dropout=0.2)
    common = {"train_dataset": word_rows(17), "processing_class": word_tokenizer(), "callbacks": list(callbacks)}
    if method == "sft":
        return DefenseTrainer(model, DefenseConfig(**settings), **common)
    if method in PATCHERS:
        config = PatcherConfig(**{"attack_every": 3, "attack_steps": 4, **PATCHERS[method], **settings})
        second = {"attack_dataset": word_rows(7, seed=1), "benign_dataset": word_rows(5, seed=2)}
        if "retain_weight" in PATCHERS[method]:
            second["retain_dataset"] = word_rows(6, seed=3)
        return PatcherTrainer(model, config, **second, **common)
    from methods import METHODS

    # Lisa changes state within the run, before and after a checkpoint.
    own = {"safety_steps": 1, "user_steps": 2} if method == "lisa" else {}
    return METHODS[method].build(model, {**settings, **own}, rows=17, callbacks=callbacks)
