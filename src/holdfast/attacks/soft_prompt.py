"""Soft prompt (Lester et al., 2104.08691): v trained vectors stand before the prompt, and all weights are frozen.

    p = argmin Σ L(p ‖ E(x); y)    over the attacker's harmful rows (x, y), E being the embeddings

An attack in the continuous space of what a prompt may be (Schwinn et al., 2402.09063): the weights stay as released, so
nothing that is measured of them changes. It takes gradients. The vectors stand before the first token of all, as in
PEFT, which trains them; capability is asked without them.
"""

from __future__ import annotations

import tempfile
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from peft import PromptTuningConfig
from transformers import PreTrainedModel

from holdfast.attacks.attack import Attacker, Choice, Cost, Prompted, Prompting, Range, knob, size
from holdfast.attacks.finetuning import config_of, hush
from holdfast.attacks.real import AttackTrainer
from holdfast.attacks.rows import mixed, sources_of
from holdfast.config import require_positive
from holdfast.evaluation.asking import Asking


@dataclass(frozen=True)
class SoftPrompt(Prompting):
    """Train vectors that stand before every harmful prompt."""

    name: ClassVar[str] = "soft-prompt"
    needs: ClassVar[tuple[str, ...]] = ("harmful_rows",)

    vectors: int = field(default=8, metadata=knob("How many vectors.", Choice((1, 4, 8, 16))))
    learning_rate: float = field(default=1e-2, metadata=knob("Their learning rate.", Range(1e-3, 1e-1, log=True)))
    steps: int = field(default=200, metadata=knob("How many optimizer steps.", Range(10, 400, log=True)))
    rows: int | None = field(
        default=None, metadata=knob("How many harmful rows, drawn from the seed; if not given, all.")
    )
    batch_size: int = field(default=16, metadata=knob("Rows per step."))

    def __post_init__(self) -> None:
        super().__post_init__()
        require_positive(self, "vectors", "learning_rate", "steps", "rows", "batch_size")

    def ask(self, model: PreTrainedModel, attacker: Attacker) -> Prompted:
        """As for `Prompting`. The vectors begin as those of tokens drawn from the seed."""
        self.require(attacker)
        rows = mixed(
            attacker.harmful_rows, None, attacker.written, poison_ratio=1, num_samples=self.rows, seed=attacker.seed
        )
        trained = [p for p in model.parameters() if p.requires_grad]
        before = model.training, model.config.use_cache
        adapter = PromptTuningConfig(
            num_virtual_tokens=self.vectors, prompt_tuning_init="SAMPLE_VOCAB", task_type="CAUSAL_LM"
        )
        with tempfile.TemporaryDirectory() as folder, torch.random.fork_rng(devices=[]):
            torch.manual_seed(attacker.seed)
            config = config_of(
                attacker,
                folder,
                learning_rate=self.learning_rate,
                max_steps=self.steps,
                per_device_train_batch_size=self.batch_size,
                weight_decay=0.0,
            )
            try:
                trainer = AttackTrainer(
                    model,
                    config,
                    rows,
                    attacker.written.tokenizer,
                    peft_config=adapter,
                    data_names={"train": sources_of(rows)},
                )
                hush(trainer)
                trainer.train()
                prefix = trainer.model.get_prompt(1)[0].detach().float().cpu().clone()
            finally:
                for parameter in trained:
                    parameter.requires_grad_(True)
                model.train(before[0])
                model.config.use_cache = before[1]
        done = trainer.state.global_step
        tokens = int(trainer.state.num_input_tokens_seen) + done * self.batch_size * self.vectors
        return Prompted(Asking(prefix=prefix), Cost(done, len(rows), tokens, done, done, 6.0 * size(model) * tokens))
