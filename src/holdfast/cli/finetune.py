"""`holdfast finetune METHOD`: train a model on a user's data without losing its safety."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from holdfast.cli import training
from holdfast.cli.arguments import FinetuneData, SafeFinetuneData, SpardData
from holdfast.cli.console import say, set_up_logging
from holdfast.cli.effects import LISA, SPARD
from holdfast.cli.parser import HoldfastParser
from holdfast.cli.training import WEIGHTS, Method, Sets
from holdfast.config import DefenseConfig
from holdfast.data.formats import with_names
from holdfast.data.refusals import named_file
from holdfast.data.rendering import ChatFormat
from holdfast.data.safety import choose_safety_rows
from holdfast.data.sources import named
from holdfast.data.templates import is_template_file
from holdfast.errors import InputError
from holdfast.files import write_jsonl
from holdfast.finetuning.antibody import AntibodyConfig, AntibodyTrainer
from holdfast.finetuning.lisa import LisaConfig, LisaTrainer
from holdfast.finetuning.spard import SpardConfig, SpardTrainer
from holdfast.trainer import DefenseTrainer


def _choose_safety(
    sets: Sets, data: SpardData, config: DefenseConfig, model: Any, tokenizer: PreTrainedTokenizerBase
) -> Sets:
    """Take the part of the safety data that is to be projected on."""
    if data.safety_selection == "all":
        return sets
    template = config.chat_template_path
    if data.safety_selection == "dpp" and template is not None and not is_template_file(template):
        raise InputError(
            f"--chat_template_path {template}: with --safety_selection dpp it must be a .jinja file, since prompts are "
            "embedded before the model is given another tokenizer's tokens"
        )
    upload = sets["train_dataset"]
    say(f"choosing safety rows ({data.safety_selection}) for {len(upload)} rows of {named(data.train_data)}")
    chosen = choose_safety_rows(
        with_names(sets["safety_dataset"], name="safety"),
        upload,
        model.to(config.device),
        ChatFormat.of(tokenizer, config),
        rule=data.safety_selection,
        share=data.safety_share,
        beta=data.safety_beta,
        seed=config.seed,
        safety_file=named_file(data.safety_data),
        upload_file=named_file(data.train_data),
    )
    return {**sets, "safety_dataset": chosen}


def _write_weights(trainer: AntibodyTrainer, folder: Path) -> list[str]:
    """Write every row's mean weight times the rows of its batch."""
    write_jsonl(folder / WEIGHTS, [{"row": row, "weight": weight} for row, weight in trainer.row_weights.items()])
    return [WEIGHTS]


_METHODS = {
    "sft": Method(FinetuneData, DefenseConfig, DefenseTrainer),
    "lisa": Method(SafeFinetuneData, LisaConfig, LisaTrainer, effects=LISA),
    "spard": Method(SpardData, SpardConfig, SpardTrainer, choose=_choose_safety, effects=SPARD),
    "antibody": Method(FinetuneData, AntibodyConfig, AntibodyTrainer, report=_write_weights),
}


def make_parser(method: str) -> HoldfastParser:
    """Return the parser of `finetune METHOD`."""
    description = "Train a model on a user's data; the finished model and its tokenizer lie in --output_dir."
    return training.make_parser("finetune", method, _METHODS, description)


def run(method: str, argv: list[str]) -> int:
    """Fine-tune a model with `method`; see `holdfast.cli.training.run`."""
    set_up_logging()
    return training.run(f"finetune {method}", "fine-tuning", _METHODS[method], make_parser(method).parse(argv))
