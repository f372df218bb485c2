"""Every method but Patcher and SFT, for tests that hold for each: how to build its trainer, and its slow reference."""

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from torch.nn.functional import pad
from transformers import (
    BloomConfig,
    BloomForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    JambaConfig,
    JambaForCausalLM,
    Lfm2Config,
    Lfm2ForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    Olmo2Config,
    Olmo2ForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen2MoeConfig,
    Qwen2MoeForCausalLM,
    Qwen3_5ForCausalLM,
    Qwen3_5TextConfig,
    Qwen3NextConfig,
    Qwen3NextForCausalLM,
)

import reference
from helpers import WORDS, Gradients, tiny_llama, word_rows, word_tokenizer
from holdfast.alignment.antibody import AntibodyAlignmentConfig, AntibodyAlignmentTrainer
from holdfast.alignment.booster import BoosterConfig, BoosterTrainer
from holdfast.alignment.vaccine import VaccineConfig, VaccineTrainer
from holdfast.attacks.finetuning import FineTuning
from holdfast.finetuning.antibody import AntibodyConfig, AntibodyTrainer
from holdfast.finetuning.lisa import LisaConfig, LisaTrainer
from holdfast.finetuning.spard import SpardConfig, SpardTrainer

Batch = dict[str, torch.Tensor]


def view(batch: Batch) -> Batch:
    return {key.removeprefix("refusal_"): value for key, value in batch.items() if key.startswith("refusal_")}


def attention_names(model: torch.nn.Module) -> list[str]:
    return [name for name, _ in model.named_modules() if name.endswith((".self_attn", ".attn"))]


def anchor(model: torch.nn.Module) -> Batch:
    return {name: p.detach() * 0.9 for name, p in model.named_parameters() if p.requires_grad}


@dataclass(frozen=True)
class Method:
    """One method.

    `expected(model, window, second)` is the slow reference; a window is a list of global micro-batches, `second`
    those of the method's second data set.
    """

    trainer: type
    config: type
    expected: Callable[..., Batch]
    settings: dict[str, Any] = field(default_factory=dict)
    second: str | None = None

    def build(
        self,
        model: torch.nn.Module,
        settings: dict[str, Any],
        rows: int | Dataset = 8,
        second: Dataset | None = None,
        callbacks=(),
        eval_rows: Dataset | None = None,
        **changes: Any,
    ) -> Any:
        data = {} if self.second is None else {f"{self.second}_dataset": second or word_rows(6, seed=1)}
        return self.trainer(
            model,
            self.config(**{**settings, **self.settings, **changes}),
            word_rows(rows) if isinstance(rows, int) else rows,
            processing_class=word_tokenizer(),
            callbacks=list(callbacks),
            eval_dataset=eval_rows,
            **data,
        )


REFUSAL = "t5 t6 t7"
KKT = {"flatness_rule": "kkt", "strength": 0.1}
COSINE = {"flatness_rule": "cosine", "strength": 5.0}
METHODS = {
    "vaccine": Method(
        VaccineTrainer,
        VaccineConfig,
        lambda model, window, _: reference.vaccine(model, window, 2.0, attention_names(model)),
    ),
    "booster": Method(
        BoosterTrainer,
        BoosterConfig,
        lambda model, window, harmful: reference.booster(model, window, harmful, 0.1, 5.0),
        second="attack",
    ),
    **{
        f"antibody_align_{rule['flatness_rule']}": Method(
            AntibodyAlignmentTrainer,
            AntibodyAlignmentConfig,
            lambda model, window, harmful, rule=rule: reference.antibody_align(
                model, window, harmful, [view(batch) for batch in harmful], 0.1, 0.05, **rule
            ),
            {"refusal": REFUSAL, **rule},
            second="attack",
        )
        for rule in (KKT, COSINE)
    },
    "lisa": Method(
        LisaTrainer,
        LisaConfig,
        lambda model, window, _: reference.lisa(model, window, anchor(model), 1.0),
        {"proximal_start": 0.0},
        second="safety",
    ),
    "antibody_finetune": Method(
        AntibodyTrainer,
        AntibodyConfig,
        lambda model, window, _: reference.antibody_finetune(model, window, [view(batch) for batch in window], 1.0),
        {"refusal": REFUSAL},
    ),
    "spard": Method(SpardTrainer, SpardConfig, lambda model, window, _: reference.sft(model, window), second="safety"),
}


class Noted(Iterator[Batch]):
    """Passes batches on and keeps them."""

    def __init__(self, batches: Iterator[Batch]) -> None:
        self.batches, self.seen = batches, []

    def __next__(self) -> Batch:
        self.seen.append(next(self.batches))
        return self.seen[-1]


def noted_windows(trainer: Any) -> list[list[Batch]]:
    """Fills with the window of every update, once the trainer is run."""
    windows: list[list[Batch]] = []
    get_batch_samples = trainer.get_batch_samples

    def noting(*arguments: Any) -> Any:
        found = get_batch_samples(*arguments)
        windows.append([copy.deepcopy(dict(batch)) for batch in found[0]])
        return found

    trainer.get_batch_samples = noting
    return windows


@dataclass
class Update:
    """The first update of a run: its window, its method's second batches, and the gradient that it used."""

    window: list[Batch]
    second: list[Batch]
    gradient: Batch
    trainer: Any


def first_update(method: Method, model: torch.nn.Module, settings: dict[str, Any], **changes: Any) -> Update:
    """Train for one update and keep what it was made of."""
    noted = Gradients()
    trainer = method.build(model, {**settings, "max_steps": 1, "max_grad_norm": 0.0, **changes}, callbacks=[noted])
    if method.trainer is LisaTrainer:
        trainer.anchor = anchor(model)
    second = None
    if method.second == "attack":
        second = trainer.attack_batches = Noted(trainer.attack_batches)
    windows = noted_windows(trainer)
    trainer.train()
    return Update(windows[0], second.seen if second else [], noted.seen[0], trainer)


def joined(batches: list[Batch]) -> Batch:
    """The rows of several ranks' batches as one batch."""
    fill = {"labels": -100, "refusal_labels": -100}
    found = {}
    for key in batches[0]:
        tensors = [batch[key] for batch in batches]
        if tensors[0].ndim > 1:
            longest = max(t.shape[1] for t in tensors)
            tensors = [pad(t, (0, longest - t.shape[1]), value=fill.get(key, 0)) for t in tensors]
        found[key] = torch.cat(tensors)
    return found


def qwen2() -> Qwen2ForCausalLM:
    """Grouped heads and tied embeddings."""
    torch.manual_seed(2)
    shape = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    return Qwen2ForCausalLM(
        Qwen2Config(vocab_size=WORDS, **shape, **heads, tie_word_embeddings=True, initializer_range=0.2)
    )


def gpt2() -> GPT2LMHeadModel:
    torch.manual_seed(3)
    without_dropout = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    return GPT2LMHeadModel(
        GPT2Config(vocab_size=WORDS, n_embd=16, n_layer=2, n_head=4, n_positions=128, **without_dropout)
    )


SHAPE: dict[str, Any] = {
    "vocab_size": WORDS,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "initializer_range": 0.2,
    "pad_token_id": 0,
}
EXPERTS = {**SHAPE, "num_experts_per_tok": 2}


def qwen2_moe(router_loss: float = 0.5) -> Qwen2MoeForCausalLM:
    """Four experts and one that all tokens share; `router_loss`: the auxiliary loss's coefficient, 0 being off."""
    torch.manual_seed(5)
    experts = {"num_experts": 4, "moe_intermediate_size": 8, "shared_expert_intermediate_size": 8}
    routed = {"router_aux_loss_coef": router_loss, "output_router_logits": router_loss > 0}
    return Qwen2MoeForCausalLM(Qwen2MoeConfig(**EXPERTS, **experts, **routed))


def mixtral(router_loss: float = 0.5) -> MixtralForCausalLM:
    """Four experts; `router_loss` as for `qwen2_moe`."""
    torch.manual_seed(6)
    routed = {"router_aux_loss_coef": router_loss, "output_router_logits": router_loss > 0}
    return MixtralForCausalLM(MixtralConfig(**EXPERTS, num_local_experts=4, **routed))


def shaken(model: PreTrainedModel) -> Any:
    """A model whose norms do not all have the gain that they begin with."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.add_(0.5 * torch.randn(parameter.shape))
    return model


def gemma2() -> Gemma2ForCausalLM:
    """A norm behind attention and MLPs, of gain 1 + weight."""
    torch.manual_seed(11)
    return shaken(Gemma2ForCausalLM(Gemma2Config(**SHAPE, head_dim=4)))


def olmo2() -> Olmo2ForCausalLM:
    """The same, of gain weight, and none before them."""
    torch.manual_seed(12)
    return shaken(Olmo2ForCausalLM(Olmo2Config(**SHAPE)))


def bloom() -> BloomForCausalLM:
    """A LayerNorm behind embeddings."""
    torch.manual_seed(13)
    shape = {"vocab_size": WORDS, "hidden_size": 16, "n_layer": 2, "n_head": 4, "initializer_range": 0.2}
    return shaken(BloomForCausalLM(BloomConfig(**shape, pad_token_id=0, hidden_dropout=0.0, attention_dropout=0.0)))


LINEAR = {
    **{"layer_types": ["linear_attention", "full_attention"], "head_dim": 4},
    **{"linear_key_head_dim": 4, "linear_value_head_dim": 4, "linear_num_key_heads": 2, "linear_num_value_heads": 4},
}


def qwen3_next() -> Qwen3NextForCausalLM:
    torch.manual_seed(7)
    experts = {"num_experts": 4, "moe_intermediate_size": 8, "shared_expert_intermediate_size": 8}
    routed = {"router_aux_loss_coef": 0.5, "output_router_logits": True}
    return Qwen3NextForCausalLM(Qwen3NextConfig(**EXPERTS, **LINEAR, **experts, **routed))


def qwen3_5() -> Qwen3_5ForCausalLM:
    torch.manual_seed(8)
    return Qwen3_5ForCausalLM(Qwen3_5TextConfig(**SHAPE, **LINEAR))


def lfm2() -> Lfm2ForCausalLM:
    torch.manual_seed(9)
    layers = {"layer_types": ["conv", "full_attention"], "block_auto_adjust_ff_dim": False}
    return Lfm2ForCausalLM(Lfm2Config(**SHAPE, **layers))


def jamba() -> JambaForCausalLM:
    torch.manual_seed(10)
    layers = {"attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2, "expert_layer_offset": 1}
    mamba = {"mamba_d_state": 4, "mamba_expand": 2, "mamba_dt_rank": 4}
    routed = {"num_experts": 4, "router_aux_loss_coef": 0.5, "output_router_logits": True}
    return JambaForCausalLM(JambaConfig(**EXPERTS, **layers, **mamba, **routed))


# Models with a layer that has something else in the place of attention: how to build them, and their token mixers.
HYBRIDS: dict[str, tuple[Callable[[], Any], list[str]]] = {
    "qwen3_next": (qwen3_next, ["model.layers.0.linear_attn", "model.layers.1.self_attn"]),
    "qwen3_5": (qwen3_5, ["model.layers.0.linear_attn", "model.layers.1.self_attn"]),
    "lfm2": (lfm2, ["model.layers.0.conv", "model.layers.1.self_attn"]),
    "jamba": (jamba, ["model.layers.0.mamba", "model.layers.1.self_attn"]),
}


def lora(base: Callable[..., PreTrainedModel] = tiny_llama, **changes: Any) -> Any:
    """An adapter in the midst of its training: neither of its factors is zero."""
    settings = {"r": 4, "target_modules": "all-linear", "lora_dropout": 0.0, **changes}
    model = get_peft_model(base(), LoraConfig(**settings))
    torch.manual_seed(4)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1)
    return model


MODELS: dict[str, Callable[[], Any]] = {
    "llama": tiny_llama,
    "qwen2": qwen2,
    "gpt2": gpt2,
    "lora": lora,
    "qwen2_moe": qwen2_moe,
    "qwen2_moe, router loss off": lambda: qwen2_moe(0.0),
    "qwen2_moe, lora": lambda: lora(qwen2_moe),
    "mixtral": mixtral,
    "mixtral, router loss off": lambda: mixtral(0.0),
    "mixtral, lora": lambda: lora(mixtral, target_modules=["q_proj", "k_proj", "v_proj", "o_proj"]),
}

# Fine-tuning attacks on `word_rows(8, seed=1)`, for ranks to be compared with one process.
TUNINGS = {
    "full": FineTuning(learning_rate=1e-2, steps=4, batch_size=4, optimizer="sgd"),
    "scheduled": FineTuning(1e-3, 3, batch_size=2, scheduler="cosine", warmup_steps=1, rows=4, first_tokens=2),
}
