"""What is attacked, and what an attacker holds: the models in one process, and everything that is read for them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from datasets import Dataset
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from holdfast.attacks.attack import Attacker, whole_model
from holdfast.attacks.back_to_base import fitting
from holdfast.data.harmful import load_harmful_rows
from holdfast.data.load import PROMPT_COLUMNS, TRAIN_COLUMNS, Prompt, load_rows
from holdfast.data.rendering import ChatFormat
from holdfast.errors import InputError
from holdfast.evaluation.evaluate import Evaluator
from holdfast.evaluation.prompts import PromptSet, Role, load_prompts
from holdfast.exchange.fingerprint import fingerprint_of
from holdfast.models import accelerator, from_flag, load_model, load_model_and_tokenizer
from holdfast.stress.trials import Target


@dataclass(frozen=True)
class Sources:
    """What a search is told of; it goes to every process.

    Attributes:
        model: The model that is measured: a folder or a name on the Hub.
        counterpart: The undefended one of the same base and data, if there is one.
        base: The public base model, if the attacker holds it.
        attack_data: The attacker's harmful rows, if it has any.
        benign_data: Its harmless prompts, if it has any.
        harmless_task_data: Rows of a harmless task to be learnt, for the tax; None: without one.
        load: Keywords of `load_model`, see `keywords`.
        evaluator: Makes what measures, with all prompts: harmful ones, capability, and those of a harmless task.
        written: `system_prompt`, `chat_template_kwargs` and `raw_text`, as `ChatFormat` has them.
    """

    model: str
    counterpart: str | None
    base: str | None
    attack_data: str | None
    benign_data: str | None
    harmless_task_data: str | None
    evaluator: Callable[[], Evaluator]
    load: Mapping[str, Any] = field(default_factory=dict)
    written: Mapping[str, Any] = field(default_factory=dict)

    def keywords(self, source: str) -> dict[str, Any]:
        """Keywords of `load_model` for one of the models; a revision is that of the one that is measured."""
        return {name: value for name, value in self.load.items() if name != "revision" or source == self.model}


class Subjects:
    """The models of a search, of which one stands on the device at a time, and what the attacker holds.

    The weights of every target lie in host memory, and are gone back to before every trial.

    Attributes:
        taken: What was taken of the attacker's data, by flag, as `load_rows` notes it.

    Raises:
        InputError: Something cannot be read, or does not fit together.
    """

    def __init__(self, sources: Sources) -> None:
        self._sources = sources
        model, self.tokenizer = load_model_and_tokenizer(sources.model, **sources.keywords(sources.model))
        self._model = whole_model(model).requires_grad_(True).to(accelerator())
        self._saved: dict[Target, dict[str, Tensor]] = {"model": _on_host(self._model)}
        self._base: PreTrainedModel | None = None
        if sources.counterpart is not None:
            with from_flag("--counterpart"):
                given = sources.keywords(sources.counterpart)
                other, tokenizer = load_model_and_tokenizer(sources.counterpart, **given)
            whole = whole_model(other).requires_grad_(True)
            self._require_twin(whole, tokenizer)
            self._saved["counterpart"] = _on_host(whole)
        self.written = ChatFormat(self.tokenizer, **sources.written)
        self.taken: dict[str, Any] = {}
        self.harmful_prompts, self.harmful_rows = _harmful(sources.attack_data, self.taken)
        self.harmless_prompts, self.harmless_rows = _harmless(sources.benign_data, self.taken)

    @property
    def targets(self) -> tuple[Target, ...]:
        """What is attacked."""
        return tuple(self._saved)

    def fresh(self, target: Target) -> PreTrainedModel:
        """The model on its device, with the weights and types that a target has on disk."""
        saved = self._saved[target]
        for name, parameter in self._model.named_parameters():
            parameter.data = saved[name].to(parameter.device, copy=True)
            parameter.grad = None
            parameter.requires_grad_(True)
        return self._model

    def attacker(self, seed: int, *, base: bool) -> Attacker:
        """What the attacker holds, and the base where it is needed."""
        return Attacker(
            self.written,
            self.harmful_prompts,
            self.harmful_rows,
            self.harmless_prompts,
            self.base() if base else None,
            seed=seed,
            harmless_rows=self.harmless_rows,
        )

    def base(self) -> PreTrainedModel:
        """The public base model, loaded when it is first needed.

        Raises:
            InputError: It cannot be loaded, or is not what the model was made of.
        """
        if self._base is None:
            source = self._sources.base
            assert source is not None  # else no attack needs it
            with from_flag("--base"):
                found = whole_model(load_model(source, **self._sources.keywords(source)))
            fitting(self._model, found)
            self._base = found
        return self._base

    def _require_twin(self, other: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
        ours, theirs = fingerprint_of(self._model, self.tokenizer), fingerprint_of(other, tokenizer)
        sources = self._sources
        for part, what in (("model", "architecture"), ("tokenizer", "tokenizer or chat template")):
            if ours[part] != theirs[part]:
                raise InputError(
                    f"--counterpart {sources.counterpart} has another {what} than --model {sources.model}; expected "
                    "the same base model, aligned without the defense"
                )


def _on_host(model: PreTrainedModel) -> dict[str, Tensor]:
    return {name: p.detach().to("cpu", copy=True).contiguous() for name, p in model.named_parameters()}


def _harmful(source: str | None, noted: dict[str, Any]) -> tuple[list[Prompt] | None, Dataset | None]:
    """The attacker's harmful prompts and rows."""
    if source is None:
        return None, None
    rows, _ = load_harmful_rows(source, flag="--attack_data", noted=noted)
    return _prompts(source, "--attack_data"), rows


def _harmless(source: str | None, noted: dict[str, Any]) -> tuple[list[Prompt] | None, Dataset | None]:
    """Its harmless prompts, and rows where there are answers to them."""
    if source is None:
        return None, None
    rows = load_rows(source, flag="--benign_data", columns=(*TRAIN_COLUMNS, *PROMPT_COLUMNS), noted=noted)
    answered = any(set(group) <= set(rows.column_names) for group in TRAIN_COLUMNS)
    return _prompts(source, "--benign_data"), rows if answered else None


def _prompts(source: str, flag: str) -> list[Prompt]:
    prompts: list[Prompt] = load_prompts(source, flag=flag, role="harmful", judge_name="refusal").prompts
    return prompts


def with_sets(evaluator: Evaluator, *roles: Role) -> Evaluator:
    """The evaluator with the sets of these roles alone, as far as it has them."""
    return replace(evaluator, sets=[prompts for prompts in evaluator.sets if prompts.role in roles])


def set_of(evaluator: Evaluator, role: Role) -> PromptSet:
    """The prompts of one role."""
    return next(prompts for prompts in evaluator.sets if prompts.role == role)


def spread(evaluator: Evaluator, count: int, tokens: int) -> tuple[Evaluator, dict[Role, list[int]]]:
    """An evaluator of fewer prompts, spread evenly over each set, with shorter answers.

    Args:
        evaluator: The whole one.
        count: How many prompts of each set.
        tokens: The longest answer.

    Returns:
        It, and the rows (from 1) that its prompts have in the whole one.
    """
    sets, rows = [], dict[Role, list[int]]()
    for prompts in evaluator.sets:
        total = len(prompts.prompts)
        places = [index * total // min(count, total) for index in range(min(count, total))]
        answers = None if prompts.answers is None else [prompts.answers[place] for place in places]
        sets.append(replace(prompts, prompts=[prompts.prompts[place] for place in places], answers=answers))
        rows[prompts.role] = [place + 1 for place in places]
    decoding = replace(evaluator.decoding, max_new_tokens=min(tokens, evaluator.decoding.max_new_tokens))
    return replace(evaluator, sets=sets, decoding=decoding), rows
