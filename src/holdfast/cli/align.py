"""`holdfast align METHOD`: align a model before its release."""

from __future__ import annotations

from holdfast.alignment.antibody import AntibodyAlignmentConfig, AntibodyAlignmentTrainer
from holdfast.alignment.booster import BoosterConfig, BoosterTrainer
from holdfast.alignment.patcher import PatcherConfig, PatcherTrainer
from holdfast.alignment.vaccine import VaccineConfig, VaccineTrainer
from holdfast.cli import training
from holdfast.cli.arguments import AlignData, AttackedAlignData
from holdfast.cli.parser import HoldfastParser
from holdfast.cli.training import Method
from holdfast.config import DefenseConfig
from holdfast.trainer import DefenseTrainer

_METHODS = {
    "sft": Method(AlignData, DefenseConfig, DefenseTrainer),
    "patcher": Method(AttackedAlignData, PatcherConfig, PatcherTrainer),
    "vaccine": Method(AlignData, VaccineConfig, VaccineTrainer),
    "booster": Method(AttackedAlignData, BoosterConfig, BoosterTrainer),
    "antibody": Method(AttackedAlignData, AntibodyAlignmentConfig, AntibodyAlignmentTrainer),
}


def make_parser(method: str) -> HoldfastParser:
    """Return the parser of `align METHOD`."""
    description = "Align a model; the finished model and its tokenizer lie in --output_dir."
    return training.make_parser(f"align {method}", _METHODS[method], description)


def run(method: str, argv: list[str]) -> int:
    """Align a model with `method`; see `holdfast.cli.training.run`."""
    return training.run(f"align {method}", "aligning", _METHODS[method], make_parser(method), argv)
