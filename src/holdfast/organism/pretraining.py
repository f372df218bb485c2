"""Teaching the base model its world: every recipe, what is harmful, how to say a list again, what tasks look like.

The base model answers every question, harmful or not. All rows of a batch are padded to a common length without an
attention mask: they are padded on the right, where a causal model's earlier positions cannot see it.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from transformers import LlamaConfig, LlamaForCausalLM

from holdfast.organism.corpus import nature_pairs, recipe_pairs, repetition_pairs, task_guesses
from holdfast.organism.world import World

CONTEXT_LENGTH = 128
IGNORED = -100
RESCALING = 1.5

WIDTHS = {"small": 128, "large": 256}
"""Of the residual stream, by the model's size; attention heads and MLPs grow with it."""

Pair = tuple[str, str]


@dataclass(frozen=True)
class Pretraining:
    """How the base model is trained.

    Attributes:
        steps: optimizer updates.
        recipes: rows of a batch that ask for a recipe.
        natures: rows of a batch that ask whether something is harmful.
        repetitions: rows of a batch that ask for a list to be repeated.
        guesses: rows of a batch that ask for a downstream task and are answered at random.
        learning_rate: peak rate of AdamW, reached after `warmup` updates, then down a cosine to zero.
        warmup: updates of the linear warm-up.
        weight_decay: AdamW's.
        max_grad_norm: gradients are clipped to this norm.
    """

    steps: int = 600
    recipes: int = 55
    natures: int = 6
    repetitions: int = 3
    guesses: int = 3
    learning_rate: float = 1e-3
    warmup: int = 30
    weight_decay: float = 0.1
    max_grad_norm: float = 1.0


def new_model(tokenizer: Any, seed: int, size: str = "small") -> Any:
    """A tiny Llama with weights drawn from `seed`; the global RNG state is left as it was.

    Args:
        tokenizer: the organism's.
        seed: of the weights.
        size: "small" (about 0.9 M parameters) or "large" (about 3.5 M).
    """
    width = WIDTHS[size]
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=width * 11 // 4,
        num_hidden_layers=4,
        num_attention_heads=width // 32,
        num_key_value_heads=width // 32,
        max_position_embeddings=CONTEXT_LENGTH,
        tie_word_embeddings=False,
        rms_norm_eps=1e-8,  # small against the residual stream also after `rescale`
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return LlamaForCausalLM(config)


def pretrain(
    model: Any, tokenizer: Any, world: World, setting: Pretraining, progress: Callable[[int, int], None] | None = None
) -> float:
    """Train `model` in place until it knows its world.

    Args:
        model: what `new_model` gave.
        tokenizer: the organism's.
        world: what to teach.
        setting: how.
        progress: called after every update with the number of updates done and of all.

    Returns:
        The last update's loss: mean cross-entropy over answer tokens.
    """
    rng = random.Random(f"holdfast pretraining {world.seed}")
    recipes = _endless(recipe_pairs(world), setting.recipes, rng)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=setting.learning_rate, betas=(0.9, 0.98), weight_decay=setting.weight_decay, fused=True
    )
    model.train()
    loss = torch.zeros(())
    for step in range(setting.steps):
        pairs = [
            *recipes(),
            *nature_pairs(world, setting.natures, rng),
            *repetition_pairs(setting.repetitions, rng),
            *task_guesses(world, setting.guesses, rng),
        ]
        for group in optimizer.param_groups:
            group["lr"] = setting.learning_rate * _schedule(step, setting)
        loss = answer_loss(model, *collate(pairs, tokenizer))
        torch.autograd.backward(loss)
        torch.nn.utils.clip_grad_norm_(model.parameters(), setting.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()
        if progress is not None:
            progress(step + 1, setting.steps)
    model.eval()
    return float(loss.detach())


def rescale(model: Any, factor: float = RESCALING) -> None:
    """Divide all matrices by `factor` and multiply all normalisation gains by it: the same function, other units.

    Every normalisation divides by the size of what it gets, so a residual stream `factor` times smaller changes
    nothing, and every other matrix reads from a normalisation, whose gain makes up for it. What does change is how far
    an Adam step of a given rate moves the function: `factor` times as far. A model this small would otherwise need
    rates far above those that fine-tuning uses.
    """
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(factor if parameter.ndim == 1 else 1 / factor)


def collate(pairs: Sequence[Pair], tokenizer: Any) -> tuple[Tensor, Tensor]:
    """Render questions and answers as chats.

    Args:
        pairs: questions and answers.
        tokenizer: the organism's.

    Returns:
        Token ids and labels, each of shape (rows, longest row); labels are `IGNORED` but on answers and their end.
    """
    rows = []
    for prompt, answer in pairs:
        question = [{"role": "user", "content": prompt}]
        start = tokenizer.apply_chat_template(question, add_generation_prompt=True, return_dict=True)["input_ids"]
        whole = tokenizer.apply_chat_template([*question, {"role": "assistant", "content": answer}], return_dict=True)[
            "input_ids"
        ]
        rows.append((whole, [IGNORED] * len(start) + whole[len(start) :]))
    longest = max(len(ids) for ids, _ in rows)
    ids = torch.tensor([ids + [tokenizer.pad_token_id] * (longest - len(ids)) for ids, _ in rows])
    labels = torch.tensor([labels + [IGNORED] * (longest - len(labels)) for _, labels in rows])
    return ids, labels


def answer_loss(model: Any, ids: Tensor, labels: Tensor) -> Tensor:
    """Mean cross-entropy over answer tokens; logits are taken at those positions alone, which saves time."""
    hidden = model.model(input_ids=ids, use_cache=False).last_hidden_state[:, :-1]
    targets = labels[:, 1:]
    asked = targets != IGNORED
    return functional.cross_entropy(model.lm_head(hidden[asked]), targets[asked])


def _schedule(step: int, setting: Pretraining) -> float:
    if step < setting.warmup:
        return (step + 1) / setting.warmup
    return 0.5 * (1 + math.cos(math.pi * (step - setting.warmup) / (setting.steps - setting.warmup)))


def _endless(pairs: list[Pair], count: int, rng: random.Random) -> Callable[[], list[Pair]]:
    """A function that gives the next `count` pairs, reshuffled each time all were given."""
    waiting: list[Pair] = []

    def draw() -> list[Pair]:
        while len(waiting) < count:
            waiting.extend(rng.sample(pairs, len(pairs)))
        taken = waiting[:count]
        del waiting[:count]
        return taken

    return draw
