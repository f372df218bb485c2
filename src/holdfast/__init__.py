"""Holdfast hardens language models against malicious fine-tuning, and measures how hard they are to break."""

import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

from holdfast.importing import import_heavy

if TYPE_CHECKING:
    from holdfast.alignment.antibody import AntibodyAlignmentConfig as AntibodyAlignmentConfig
    from holdfast.alignment.antibody import AntibodyAlignmentTrainer as AntibodyAlignmentTrainer
    from holdfast.alignment.booster import BoosterConfig as BoosterConfig
    from holdfast.alignment.booster import BoosterTrainer as BoosterTrainer
    from holdfast.alignment.patcher import PatcherTrainer as PatcherTrainer
    from holdfast.alignment.patcher_config import PatcherConfig as PatcherConfig
    from holdfast.alignment.vaccine import VaccineConfig as VaccineConfig
    from holdfast.alignment.vaccine import VaccineTrainer as VaccineTrainer
    from holdfast.attacks.ablation import Ablation as Ablation
    from holdfast.attacks.attack import Attacker as Attacker
    from holdfast.attacks.back_to_base import BackToBase as BackToBase
    from holdfast.attacks.best_of_n import BestOfN as BestOfN
    from holdfast.attacks.chain import Chain as Chain
    from holdfast.attacks.demonstrations import Demonstrations as Demonstrations
    from holdfast.attacks.dropping import Dropping as Dropping
    from holdfast.attacks.finetuning import FineTuning as FineTuning
    from holdfast.attacks.noise import Noise as Noise
    from holdfast.attacks.prefill import Prefill as Prefill
    from holdfast.attacks.pruning import Pruning as Pruning
    from holdfast.attacks.raw import Raw as Raw
    from holdfast.attacks.real import AttackConfig as AttackConfig
    from holdfast.attacks.real import AttackTrainer as AttackTrainer
    from holdfast.attacks.rounding import Rounding as Rounding
    from holdfast.attacks.simulated import SimulatedAttack as SimulatedAttack
    from holdfast.attacks.simulated import simulate_attack as simulate_attack
    from holdfast.attacks.soft_prompt import SoftPrompt as SoftPrompt
    from holdfast.config import DefenseConfig as DefenseConfig
    from holdfast.data.load import load_rows as load_rows
    from holdfast.data.mix import poison as poison
    from holdfast.data.rendering import ChatFormat as ChatFormat
    from holdfast.data.selection import relevance_diversity_dpp as relevance_diversity_dpp
    from holdfast.errors import InputError as InputError
    from holdfast.errors import TrainingError as TrainingError
    from holdfast.evaluation.evaluate import Evaluator as Evaluator
    from holdfast.evaluation.prompts import load_prompts as load_prompts
    from holdfast.finetuning.antibody import AntibodyConfig as AntibodyConfig
    from holdfast.finetuning.antibody import AntibodyTrainer as AntibodyTrainer
    from holdfast.finetuning.lisa import LisaConfig as LisaConfig
    from holdfast.finetuning.lisa import LisaTrainer as LisaTrainer
    from holdfast.finetuning.spard import SpardConfig as SpardConfig
    from holdfast.finetuning.spard import SpardTrainer as SpardTrainer
    from holdfast.organism import build_organism as build_organism
    from holdfast.repair.antidote import prune_harmful as prune_harmful
    from holdfast.repair.antidote import wanda_mask as wanda_mask
    from holdfast.trainer import DefenseTrainer as DefenseTrainer

__version__ = "0.2.0"

# Loaded when first asked for: torch, transformers and TRL take seconds to import.
_HOMES = {
    "VaccineConfig": "holdfast.alignment.vaccine",
    "VaccineTrainer": "holdfast.alignment.vaccine",
    "BoosterConfig": "holdfast.alignment.booster",
    "BoosterTrainer": "holdfast.alignment.booster",
    "AntibodyAlignmentConfig": "holdfast.alignment.antibody",
    "AntibodyAlignmentTrainer": "holdfast.alignment.antibody",
    "LisaConfig": "holdfast.finetuning.lisa",
    "LisaTrainer": "holdfast.finetuning.lisa",
    "SpardConfig": "holdfast.finetuning.spard",
    "SpardTrainer": "holdfast.finetuning.spard",
    "AntibodyConfig": "holdfast.finetuning.antibody",
    "AntibodyTrainer": "holdfast.finetuning.antibody",
    "relevance_diversity_dpp": "holdfast.data.selection",
    "PatcherConfig": "holdfast.alignment.patcher_config",
    "PatcherTrainer": "holdfast.alignment.patcher",
    "Attacker": "holdfast.attacks.attack",
    "Ablation": "holdfast.attacks.ablation",
    "BackToBase": "holdfast.attacks.back_to_base",
    "BestOfN": "holdfast.attacks.best_of_n",
    "Chain": "holdfast.attacks.chain",
    "Demonstrations": "holdfast.attacks.demonstrations",
    "Dropping": "holdfast.attacks.dropping",
    "FineTuning": "holdfast.attacks.finetuning",
    "Noise": "holdfast.attacks.noise",
    "Prefill": "holdfast.attacks.prefill",
    "Pruning": "holdfast.attacks.pruning",
    "Raw": "holdfast.attacks.raw",
    "Rounding": "holdfast.attacks.rounding",
    "SoftPrompt": "holdfast.attacks.soft_prompt",
    "AttackConfig": "holdfast.attacks.real",
    "AttackTrainer": "holdfast.attacks.real",
    "SimulatedAttack": "holdfast.attacks.simulated",
    "simulate_attack": "holdfast.attacks.simulated",
    "load_rows": "holdfast.data.load",
    "ChatFormat": "holdfast.data.rendering",
    "poison": "holdfast.data.mix",
    "InputError": "holdfast.errors",
    "TrainingError": "holdfast.errors",
    "Evaluator": "holdfast.evaluation.evaluate",
    "load_prompts": "holdfast.evaluation.prompts",
    "build_organism": "holdfast.organism",
    "prune_harmful": "holdfast.repair.antidote",
    "wanda_mask": "holdfast.repair.antidote",
    "DefenseConfig": "holdfast.config",
    "DefenseTrainer": "holdfast.trainer",
}
__all__ = ["__version__", *_HOMES]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'holdfast' has no attribute {name!r}")
    return getattr(import_heavy(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)


# `holdfast` on the public package index is another project, whose files go where those of `holdfast-llm` go.
for _namesake in Path(__file__).parents[1].glob("holdfast-*.dist-info"):
    warnings.warn(
        f"another project, {_namesake.stem.replace('-', ' ')}, is installed in the same place as holdfast-llm and "
        "replaces files of it: run `pip uninstall -y holdfast holdfast-llm`, then `pip install holdfast-llm`",
        stacklevel=2,
    )
