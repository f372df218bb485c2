"""Tasks of lm_eval on a model in memory, with prompts as every other prompt is written.

lm_eval chooses prompts, shots, decoding and metrics, as the task says. What is replaced is its rendering, by
`ChatFormat`, and how answers are read: reasoning is cut off them first.
"""

from __future__ import annotations

import copy
import difflib
import logging
import random
import traceback
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import lm_eval.api.model
import lm_eval.api.task
import lm_eval.models.huggingface
import numpy as np
import torch
from lm_eval.api.instance import Instance
from lm_eval.evaluator import evaluate
from lm_eval.models.huggingface import HFLM
from lm_eval.models.utils import normalize_gen_kwargs
from lm_eval.tasks import TaskManager
from lm_eval.tasks._yaml_loader import load_yaml
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from holdfast.data.limits import Limits
from holdfast.data.rendering import ChatFormat
from holdfast.errors import InputError
from holdfast.evaluation.answers import hidden_tokens, split_reasoning
from holdfast.evaluation.generation import preserved
from holdfast.evaluation.tasks import TaskFigure
from holdfast.hub import reason

logger = logging.getLogger(__name__)

# As lm_eval's own command seeds the draw of the examples that prompts show, so that figures can be compared.
_SHOTS_SEED = 1234
_SETTLED = ("name", "alias", "sample_len", "sample_count")
# Characters of a prompt's end among which a mark that opens reasoning is looked for.
_TAIL = 200


def _bar(*arguments: Any, disable: bool = False, **keywords: Any) -> Any:
    return tqdm(*arguments, disable=disable or None, **keywords)


# Without a terminal bars are silent here, and lm_eval's would not be.
for _module in (lm_eval.api.model, lm_eval.api.task, lm_eval.models.huggingface):
    _module.tqdm = _bar


@dataclass(frozen=True)
class HarnessTasks:
    """As for `holdfast.evaluation.tasks.CapabilityTasks`.

    Attributes:
        names: The tasks, tags and groups that were asked for.
        limit: Only the first so many documents of each task are taken; None: all.
        loaded: What lm_eval made of them.
    """

    names: tuple[str, ...]
    limit: int | None
    loaded: Mapping[str, Any] = field(compare=False, repr=False)

    @classmethod
    def load(cls, names: tuple[str, ...], include_path: str | Path | None, limit: int | None) -> HarnessTasks:
        """As for `holdfast.evaluation.tasks.load_tasks`."""
        if include_path is not None and not Path(include_path).is_dir():
            raise InputError(f"--capability_include_path {include_path} is no folder; expected one with task files")
        with _quiet():
            manager = _manager(names, include_path)
            if unknown := [name for name in names if name not in manager.all_tasks]:
                near = _nearest(unknown[0], manager)
                passed_over = "" if include_path is None else _passed_over(Path(include_path))
                raise InputError(f"--capability_tasks {unknown[0]}: lm_eval has no such task{near}{passed_over}")
            try:
                loaded = manager.load(list(names))
            except ImportError as error:
                raise InputError(
                    f"--capability_tasks {','.join(names)}: a task needs a package that is not installed "
                    f"({reason(error)}); see the extras of lm_eval"
                ) from error
            except Exception as error:  # tasks are read by their authors' code and settings, data by several libraries
                why = f"there is no {error}" if isinstance(error, KeyError) else reason(error)
                raise InputError(
                    f"--capability_tasks {','.join(names)}: a task or its data cannot be read ({why})"
                ) from error
        for name, task in loaded["tasks"].items():
            if getattr(task, "UNSAFE_CODE", False):
                raise InputError(f"--capability_tasks {name} runs what the model writes, which Holdfast does not do")
            if getattr(task, "MULTIMODAL", False):
                raise InputError(f"--capability_tasks {name} shows pictures or sounds; expected a task of text alone")
            if task.get_config("num_fewshot") is None:
                task.set_config(key="num_fewshot", value=0)
            task.set_fewshot_seed(seed=_SHOTS_SEED)
        return cls(names, limit, loaded)

    def check(self, model: PreTrainedModel, written: ChatFormat) -> None:
        """As for `holdfast.evaluation.tasks.CapabilityTasks`."""
        positions = Limits.of(model).positions
        lm = _Model(model, written, 1)
        for name, task in self.loaded["tasks"].items():
            if task.OUTPUT_TYPE == "generate_until":
                room = normalize_gen_kwargs(task.get_config("generation_kwargs") or {}, lm.max_gen_toks)["max_gen_toks"]
                if positions is not None and room >= positions:
                    raise InputError(
                        f"--capability_tasks {name} asks for answers of {room} tokens, which leaves no room for a "
                        f"prompt: the model has {positions} positions"
                    )
            try:
                task.build_all_requests(limit=1, **_written(lm, written))
            except InputError:
                raise
            except Exception as error:  # of what the task says of its prompts
                raise InputError(f"--capability_tasks {name}: no prompt can be written ({reason(error)})") from error

    def __call__(
        self, model: PreTrainedModel, written: ChatFormat, *, batch_size: int, seed: int
    ) -> tuple[TaskFigure, ...]:
        """As for `holdfast.evaluation.tasks.CapabilityTasks`."""
        with preserved(model, seed):
            random.seed(seed)
            np.random.seed(seed)
            lm = _Model(model, written, batch_size)
            settings = _written(lm, written)
            try:
                found = evaluate(
                    lm,
                    self.loaded,
                    limit=self.limit,
                    log_samples=False,
                    system_instruction=settings["system_instruction"],
                    apply_chat_template=settings["apply_chat_template"],
                    fewshot_as_multiturn=settings["fewshot_as_multiturn"],
                )
            except InputError:
                raise
            except Exception as error:  # patterns, filters and metrics are tried with the first answer
                if _comes_from_the_model(error):
                    raise
                raise InputError(
                    f"--capability_tasks {','.join(self.names)}: a task cannot grade an answer ({reason(error)})"
                ) from error
        return tuple(_figures(found))


class _Model(HFLM):
    """A model in memory, as lm_eval asks it."""

    def __init__(self, model: PreTrainedModel, written: ChatFormat, batch_size: int) -> None:
        kind = model.device.type
        with _quiet():
            super().__init__(
                pretrained=model,
                tokenizer=copy.deepcopy(written.tokenizer),  # which is given a pad token, and padded on the left
                batch_size=batch_size,
                max_length=Limits.of(model).positions,
                # It leaves autocast, in which an attack in bf16 measures, unless it is told of it.
                mixed_precision_dtype=torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None,
                # A template writes its special tokens itself.
                add_bos_token=None if written.plain is not None else False,
            )
        self._written = written
        self._hidden = hidden_tokens(written.tokenizer)

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """Write turns, of which the last begins the answer unless a generation prompt is added."""
        begun = "" if add_generation_prompt else chat_history[-1]["content"]
        turns = chat_history if add_generation_prompt else chat_history[:-1]
        try:
            return self._written.render_prompt(turns, "a prompt of --capability_tasks") + begun
        except InputError:
            if self._written.system_prompt is not None or turns[0]["role"] != "system":
                raise
            text = self._written.render_prompt(turns[1:], "a prompt of --capability_tasks") + begun
            logger.warning("the chat template refuses the system turn of a task, which is left out, as lm_eval does")
            return text

    def tok_decode(self, tokens: Any, skip_special_tokens: bool = True) -> str:
        """Text of tokens, with the marks of reasoning also where they are special tokens."""
        if skip_special_tokens:
            tokens = [token for token in tokens if token not in self._hidden]
        return str(self.tokenizer.decode(tokens, skip_special_tokens=False))

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Answers, without their reasoning."""
        texts = super().generate_until(requests, disable_tqdm)
        return [_answer(text, str(request.args[0])) for text, request in zip(texts, requests, strict=True)]


def _comes_from_the_model(error: Exception) -> bool:
    """Whether an exception comes through the model, and not through what a task says."""
    modules = [str(frame.f_globals.get("__name__")) for frame, _ in traceback.walk_tb(error.__traceback__)]
    return any(name.startswith("lm_eval.models.") for name in modules)


def _answer(text: str, prompt: str) -> str:
    answer = split_reasoning(text, prompt[-_TAIL:])
    return text if answer.thoughts is None and not answer.thinking_unclosed else answer.text


def _written(lm: _Model, written: ChatFormat) -> dict[str, Any]:
    """How requests are built."""
    templated = written.plain is None
    return {
        "system_instruction": written.system_prompt,
        "apply_chat_template": templated,
        "fewshot_as_multiturn": templated,
        "chat_template": lm.apply_chat_template if templated else None,
    }


def _manager(names: Sequence[str], include_path: str | Path | None) -> TaskManager:
    """What finds tasks by name. To read lm_eval's own takes seconds, so it is done where the folder has not all."""
    if include_path is not None:
        own = TaskManager(include_path=str(include_path), include_defaults=False)
        if set(names) <= set(own.all_subtasks):
            return own
    return TaskManager(include_path=None if include_path is None else str(include_path))


def _nearest(name: str, manager: TaskManager) -> str:
    near = difflib.get_close_matches(name, manager.all_tasks, n=3, cutoff=0.5)
    return f"; the nearest are {', '.join(near)}" if near else ""


def _passed_over(folder: Path) -> str:
    """Which file of one's own lm_eval takes for none, and why, which it does not say."""
    for path in sorted(folder.glob("**/*.yaml")):
        try:
            load_yaml(path, resolve_func=False)
        except Exception as error:  # it reads other files that one names, too
            return f"; {path} is none that it can read ({' '.join(str(error).split())})"
    return ""


def _figures(found: Mapping[str, Any]) -> Iterator[TaskFigure]:
    for task, metrics in found["results"].items():
        for name, value in metrics.items():
            metric, _, chosen = name.partition(",")
            if name in _SETTLED or metric.endswith("_stderr") or not isinstance(value, int | float):
                continue
            stderr = metrics.get(f"{metric}_stderr,{chosen}")
            shots = found["n-shot"].get(task)
            yield TaskFigure(
                task=task,
                metric=name.removesuffix(",none"),
                value=float(value),
                stderr=float(stderr) if isinstance(stderr, int | float) else None,
                n=int(metrics.get("sample_count", {}).get(name, metrics["sample_len"])),
                version=str(found["versions"].get(task)),
                lm_eval=version("lm_eval"),
                shots=None if shots is None else int(shots),
            )


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep to itself what lm_eval warns of while it loads, which nobody can do anything about."""
    named = logging.getLogger("lm_eval")
    level = named.level
    named.setLevel(logging.ERROR)
    try:
        yield
    finally:
        named.setLevel(level)
