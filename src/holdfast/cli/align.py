"""`holdfast align METHOD`: align a model before its release."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from holdfast.alignment.antibody import AntibodyAlignmentConfig, AntibodyAlignmentTrainer
from holdfast.alignment.booster import BoosterConfig, BoosterTrainer
from holdfast.alignment.parallel import ParallelPatcherConfig, PatcherDefenderTrainer
from holdfast.alignment.patcher import PatcherTrainer
from holdfast.alignment.pool import Pool
from holdfast.alignment.presets import NEEDS, PRESETS
from holdfast.alignment.vaccine import VaccineConfig, VaccineTrainer
from holdfast.cli import parallel, training
from holdfast.cli.arguments import AlignData, AttackedAlignData, PatcherData
from holdfast.cli.console import set_up_logging, warn
from holdfast.cli.effects import PATCHER
from holdfast.cli.parser import HoldfastParser
from holdfast.cli.training import VECTORS, Method
from holdfast.config import DefenseConfig
from holdfast.errors import InputError
from holdfast.files import write_jsonl
from holdfast.trainer import DefenseTrainer

_METHODS = {
    "sft": Method(AlignData, DefenseConfig, DefenseTrainer),
    "patcher": Method(
        PatcherData, ParallelPatcherConfig, PatcherTrainer, effects=PATCHER, presets=PRESETS, needs=NEEDS
    ),
    "vaccine": Method(AlignData, VaccineConfig, VaccineTrainer),
    "booster": Method(AttackedAlignData, BoosterConfig, BoosterTrainer),
    "antibody": Method(AttackedAlignData, AntibodyAlignmentConfig, AntibodyAlignmentTrainer),
}


def make_parser(method: str) -> HoldfastParser:
    """Return the parser of `align METHOD`."""
    description = "Align a model; the finished model and its tokenizer lie in --output_dir."
    more = [parallel.ParallelArguments] if method == "patcher" else []
    return training.make_parser("align", method, _METHODS, description, *more)


def run(method: str, argv: list[str]) -> int:
    """Align a model with `method`; see `holdfast.cli.training.run`, and `holdfast.cli.parallel` for Patcher's roles."""
    set_up_logging()
    chosen, parsed = _METHODS[method], make_parser(method).parse(argv)
    if method == "patcher":
        model_args, data, config, side_by_side, rest = parsed
        if rest.preset is not None:
            _require_whole(rest.preset, config, parallel=side_by_side.parallel)
        if side_by_side.parallel:
            if config.role:
                raise InputError(f"--parallel starts both roles: leave out --role {config.role}")
            config.require_what_attackers_make()
        elif config.exchange and not config.role:
            raise InputError(f"--exchange {config.exchange} needs --role defender, --role attacker or --parallel")
        _require_rows(data, config)
        defends_beside = config.role == "defender" or side_by_side.parallel
        if defends_beside and (unattacked := _unattacked(config)):
            warn(f"{unattacked}: the model will be aligned without one")
        if side_by_side.parallel:
            return parallel.supervise(argv, side_by_side, config)
        if config.role == "attacker":
            return parallel.run_attacker(model_args, data, config)
        if config.role == "defender":
            chosen = replace(chosen, trainer=PatcherDefenderTrainer, report=_write_vectors)
    return training.run(f"align {method}", "aligning", chosen, parsed)


def _require_rows(data: PatcherData, config: ParallelPatcherConfig) -> None:
    """See that there are all rows that a run takes, and that harmless ones are not the attacker's.

    An attacker of a parallel run may be given the defender's settings without the defender's data.
    """
    if data.attack_data is None and Pool.of(config.pool).trained:
        raise InputError(
            "--attack_data is missing: harmful prompts with harmful answers, which simulated attacks train on; a "
            "--pool in which nothing is trained can do without"
        )
    for name in ("benign_data", "retain_data"):
        if getattr(data, name) is not None and getattr(data, name) == data.attack_data:
            raise InputError(f"--{name} is what --attack_data is, {data.attack_data}; expected harmless rows")
    if config.role != "attacker":
        given = {name: getattr(data, f"{name}_data") is not None for name in ("attack", "benign", "retain")}
        config.require_data(**given)


def _require_whole(preset: str, config: ParallelPatcherConfig, *, parallel: bool) -> None:
    """See that a run is one under a preset: that attacks come in it, and of those that it names."""
    if unattacked := _unattacked(config):
        raise InputError(f"--preset {preset}: {unattacked}; expected more steps")
    if parallel:
        try:
            config.require_what_attackers_make()
        except InputError as error:
            raise InputError(f"--preset {preset} has no parallel form: {error}") from error


def _unattacked(config: ParallelPatcherConfig) -> str | None:
    """Why no attack comes in a run of so many steps, if none does."""
    if not 0 < config.max_steps <= config.attack_every:
        return None
    due = f"--attack_every {config.attack_every}, --max_steps {config.max_steps}"
    return f"no attack is due before the end of the run ({due})"


def _write_vectors(trainer: PatcherDefenderTrainer, folder: Path) -> list[str]:
    """Where every attack vector came from."""
    if not trainer.vectors:
        rest = "with the rest of the pool alone" if trainer.args.pool else "without one"
        warn(f"no attack vector came in force: this model was aligned {rest}")
    write_jsonl(folder / VECTORS, trainer.vectors)
    return [VECTORS]
