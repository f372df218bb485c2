"""The attacks of a pool on a model in training: what they hold, and what each is at this update's weights.

An attack that is a rule for the weights is found anew whenever it is drawn, on the weights of that update. So there is
nothing of it to be kept, and what it aims at does not lag behind the defender: an ablation's direction takes two
forward passes over a handful of prompts, the others nothing.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from datasets import Dataset
from peft import PeftModel
from transformers import PreTrainedModel

from holdfast.alignment.pool import ADAPTED, Link, Member, Pool
from holdfast.attacks.ablation import Ablation, prompt_tokens
from holdfast.attacks.attack import Attacker, Choice
from holdfast.attacks.changes import Changes, change, changed, composed
from holdfast.data.formats import names_of
from holdfast.data.load import Prompt
from holdfast.data.rendering import ChatFormat
from holdfast.errors import InputError
from holdfast.evaluation.prompts import prompts_of
from holdfast.residual import decoder_layers, layer_number


class Adversary:
    """The attacks of a pool that are rules for the weights, alone or in a chain.

    Args:
        model: The model in training, sharded by FSDP2 or not; or a LoRA adapter on one, which is then displaced alone.
        pool: The pool.
        written: How prompts become token ids.
        harmful: Rows with harmful prompts.
        harmless: Rows with harmless ones; answers play no part.
        base: The public base model.

    Raises:
        InputError: The pool has an attack that needs what is missing, or that does not fit the model.
    """

    def __init__(
        self,
        model: PreTrainedModel | PeftModel,
        pool: Pool,
        written: ChatFormat,
        *,
        harmful: Dataset | None,
        harmless: Dataset | None,
        base: PreTrainedModel | None,
    ) -> None:
        self._model, self._written, self._base = model, written, base
        self._harmful: list[Prompt] = []
        self._harmless: list[Prompt] = []
        links = pool.links
        if any(link.name == ADAPTED for link in links) and isinstance(model, PeftModel):
            raise InputError(f"--pool {ADAPTED}: an adapter cannot be put on another one; leave it out of the pool")
        if Ablation.name in {link.name for link in links}:
            self._harmful, self._harmless = (
                _prompts(model, rows, name, written) for rows, name in ((harmful, "attack"), (harmless, "benign"))
            )
        changing = [link for link in links if link.changes]
        self._layers = len(decoder_layers(model)) if changing else 0
        for link in changing:
            self._check(link)

    def changes(self, member: Member, draws: np.random.Generator) -> Changes:
        """A member that takes no training, with knobs and prompts that are drawn, found on today's weights.

        The model is left with the bits it had.

        Raises:
            InputError: It does not fit the model or the prompts.
        """
        found: Changes = {}
        for link in member.links:
            attack, attacker = link.change(draws, self._layers), self._attacker(link, draws)
            with changed(self._model, found):
                more = attack.find(self._model, attacker).changes
            found = composed(found, more)
        return found

    def change(self, links: Sequence[Link], draws: np.random.Generator) -> None:
        """Attack the model in place, for good, by what comes before or after training in a chain.

        Raises:
            InputError: As for `changes`.
        """
        for link in links:
            attack, attacker = link.change(draws, self._layers), self._attacker(link, draws)
            change(self._model, attack.find(self._model, attacker).changes)

    def _attacker(self, link: Link, draws: np.random.Generator) -> Attacker:
        """What an attacker holds, with so many of the prompts as it looks at."""

        def some(prompts: Sequence[Prompt]) -> list[Prompt]:
            count = min(link.prompts, len(prompts))
            return [prompts[place] for place in draws.choice(len(prompts), count, replace=False)] if count else []

        return Attacker(
            self._written,
            harmful_prompts=some(self._harmful),
            harmless_prompts=some(self._harmless),
            base=self._base,
            batch_size=link.prompts,
        )

    def _check(self, link: Link) -> None:
        """See that an attack can be had, before the run."""
        attack = link.change(np.random.default_rng(0), self._layers)
        attack.require(self._attacker(link, np.random.default_rng(0)))
        if isinstance(layer := link.knobs.get("layer"), Choice):
            for number in layer.values:
                try:
                    layer_number(number, self._layers)
                except InputError as error:
                    raise InputError(f"--pool {link.name}: {error}") from error
        if not isinstance(attack, Ablation):
            attack.find(self._model, self._attacker(link, np.random.default_rng(0)))
            return
        attack.warn_of_what_is_left(self._model)
        rank, count = link.knobs["rank"], min(link.prompts, len(self._harmful))
        if isinstance(rank, Choice) and max(rank.values) > count:
            raise InputError(
                f"--pool {link.name}: rank {max(rank.values)} takes as many harmful prompts at least, and there are "
                f"{count}; give a smaller rank, or more prompts"
            )


def _prompts(model: PreTrainedModel | PeftModel, rows: Dataset | None, name: str, written: ChatFormat) -> list[Prompt]:
    """What rows ask, all of it within the model's limits."""
    if rows is None:
        return []
    places = names_of(rows, name=name)
    prompts = prompts_of(rows, places)
    prompt_tokens(model, prompts, written, places)
    return prompts
