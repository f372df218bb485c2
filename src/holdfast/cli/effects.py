"""Flags that would play no part, told of instead of being taken without a word.

Whoever types `--save_steps 100` believes that checkpoints will be written. Where nothing would follow from a flag, a
command says so and leaves; of a recipe's key, which a flag may have overruled, it only says so.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Iterable, Iterator
from functools import partial
from typing import Any, NamedTuple

from holdfast.alignment.pool import Pool
from holdfast.errors import InputError
from holdfast.evaluation.judges.settings import LOCAL_JUDGES, SERVER_JUDGES

logger = logging.getLogger(__name__)


class Effect(NamedTuple):
    """When some flags play a part.

    Attributes:
        flags: Their names, between spaces.
        plays: Whether they do, given all values of the command by name.
        otherwise: Why they do not: completes "--flag plays no part".
    """

    flags: str
    plays: Callable[[Any], bool]
    otherwise: str


_LORA = (
    "lora_r lora_alpha lora_dropout lora_target_modules lora_target_parameters lora_modules_to_save lora_task_type "
    "use_rslora use_dora"
)
_HELD_OUT = (
    "eval_delay eval_packing eval_accumulation_steps per_device_eval_batch_size prediction_loss_only bf16_full_eval"
)
_NO_ARGUMENTS = ("adamw_torch", "adamw_torch_fused", "adafactor")
_NO_WARM_UP = ("constant", "reduce_lr_on_plateau", "greedy")
_ASKED = ("eval_data", "over_refusal_data", "capability_data", "task_data")
_UNASKED = f"without --{', --'.join(_ASKED[:-1])} or --{_ASKED[-1]}"
_UNMEASURED = f"without --capability_tasks, --{', --'.join(_ASKED[:-1])} or --{_ASKED[-1]}"


def _evaluates(given: Any) -> bool:
    return bool(given.eval_strategy != "no" or given.eval_on_start)


def _asks(given: Any) -> bool:
    return any(getattr(given, name) is not None for name in _ASKED)


def _measures(given: Any) -> bool:
    return _asks(given) or given.capability_tasks is not None


_TRAINING = (
    Effect(
        "bnb_4bit_quant_type use_bnb_nested_quant bnb_4bit_quant_storage",
        lambda given: given.load_in_4bit,
        "without --load_in_4bit",
    ),
    Effect(
        "save_steps",
        lambda given: given.save_strategy == "steps",
        "without --save_strategy steps",
    ),
    Effect(
        "save_total_limit save_only_model",
        lambda given: given.save_strategy != "no",
        "with --save_strategy no: no checkpoint is written",
    ),
    Effect("logging_steps", lambda given: given.logging_strategy == "steps", "without --logging_strategy steps"),
    Effect(
        "warmup_steps",
        lambda given: given.lr_scheduler_type not in _NO_WARM_UP,
        "in a schedule without a warm-up; --scheduler constant_with_warmup has one",
    ),
    Effect(
        "lr_scheduler_kwargs",
        lambda given: given.lr_scheduler_type not in ("constant", "constant_with_warmup"),
        "in a constant schedule",
    ),
    Effect(
        "adam_beta1 adam_beta2 adam_epsilon",
        lambda given: given.optim not in ("sgd", "adagrad", "rmsprop", "adafactor"),
        "in an optimizer that is not Adam's kind",
    ),
    Effect("optim_args", lambda given: given.optim not in _NO_ARGUMENTS, "in an optimizer that takes no arguments"),
    Effect(
        "optim_target_modules",
        lambda given: any(name in given.optim for name in ("galore", "apollo")),
        "in an optimizer that is neither GaLore's kind nor APOLLO's",
    ),
    Effect(
        "activation_checkpointing_kwargs gradient_checkpointing_kwargs",
        lambda given: given.activation_checkpointing,
        "without --activation_checkpointing",
    ),
    Effect(
        "dataloader_persistent_workers",
        lambda given: given.dataloader_num_workers > 0,
        "without --dataloader_num_workers above 0",
    ),
    Effect("packing_strategy", lambda given: given.packing, "without --packing"),
    Effect("liger_kernel_config", lambda given: given.use_liger_kernel, "without --use_liger_kernel"),
    Effect("fsdp_config", lambda given: given.fsdp, "without --fsdp"),
    Effect(
        "hub_token hub_private_repo hub_model_id hub_strategy hub_always_push hub_revision",
        lambda given: given.push_to_hub,
        "without --push_to_hub",
    ),
    Effect(
        "metric_for_best_model greater_is_better",
        lambda given: given.load_best_model_at_end or given.save_strategy == "best",
        "without --load_best_model_at_end",
    ),
    Effect("run_name project", lambda given: given.report_to, "without --report_to"),
    Effect(
        "length_column_name", lambda given: given.train_sampling_strategy == "group_by_length", "in this order of rows"
    ),
    Effect("dataset_text_field", lambda given: False, "here: rows are read by their own columns"),
    Effect("do_train do_eval do_predict", lambda given: False, "here: the command says what is done"),
)

#: What `align` and `finetune` share.
TRAINING = (
    *_TRAINING,
    Effect(_LORA, lambda given: given.use_peft, "without --use_peft"),
    Effect("eval_steps", lambda given: given.eval_strategy == "steps", "without --eval_strategy steps"),
    Effect("eval_data", _evaluates, "without --eval_strategy steps or epoch"),
    Effect(_HELD_OUT, _evaluates, "without --eval_strategy steps or epoch"),
)


def _drawn(given: Any) -> set[str]:
    """The attacks that `align patcher` is trained against; without a pool it is its own alone."""
    return Pool.of(given.pool).attacks()


def _pooled(*attacks: str) -> Callable[[Any], bool]:
    """Whether `align patcher` is trained against one of these."""
    return lambda given: not _drawn(given).isdisjoint(attacks)


def _left_to(knob: str) -> Callable[[Any], bool]:
    """Whether `align patcher` trains an attack that does not say this itself; of none that trains there is nothing."""

    def plays(given: Any) -> bool:
        trained = [link for link in Pool.of(given.pool).links if link.trains]
        return not trained or any(knob not in link.knobs for link in trained)

    return plays


#: Of `align patcher`. The jobs of a parallel run are given the same words.
PATCHER = (
    Effect(
        "publish_every attacker_name exchange_timeout",
        lambda given: given.parallel or given.role,
        "without --parallel or --role: attacker and defender take turns",
    ),
    Effect(
        "attackers defender_devices attacker_devices max_restarts",
        lambda given: given.parallel or given.role,
        "without --parallel",
    ),
    Effect(
        "attack_scale pool",
        lambda given: given.alpha > 0 or given.retain_alpha > 0 or given.reroute_weight > 0,
        "with --alpha 0: no gradient is taken under attack",
    ),
    Effect(
        "attack_scale",
        lambda given: _drawn(given) != {"prefill"},
        "with a --pool of prefill alone, which displaces no weights",
    ),
    Effect(
        "attack_steps attack_learning_rate attack_batch_size attack_weight_decay",
        _pooled("fine-tuning", "lora"),
        "with a --pool in which nothing is trained",
    ),
    *(
        Effect(f"attack_{knob}", _left_to(knob), f"with a --pool in which all that trains has a {knob} of its own")
        for knob in ("steps", "learning_rate", "batch_size")
    ),
    Effect(
        "attack_data",
        lambda given: given.reroute_weight > 0 or _pooled("fine-tuning", "lora", "ablation", "prefill")(given),
        "with a --pool that takes no harmful prompts, and without --reroute_weight",
    ),
    Effect("benign_data", _pooled("ablation"), "without a --pool with ablation"),
    Effect(
        "retain_weight retain_alpha origin_decay", lambda given: given.retain_data is not None, "without --retain_data"
    ),
    Effect("reroute_layers", lambda given: given.reroute_weight > 0, "without --reroute_weight"),
    Effect("base", _pooled("base"), "without a --pool with base"),
    Effect("refusal", _pooled("prefill"), "without a --pool with prefill"),
)

#: Of `finetune lisa` and `finetune spard`.
LISA = (Effect("proximal_start", lambda given: given.rho > 0, "with --rho 0"),)
SPARD = (
    Effect("safety_share", lambda given: given.safety_selection != "all", "with --safety_selection all"),
    Effect("safety_beta", lambda given: given.safety_selection == "dpp", "without --safety_selection dpp"),
)


def _judged_by(chosen: str) -> Iterator[Effect]:
    """When the flags of a judge play a part, which begin with that which chooses it."""
    for names, judges in _JUDGES_FLAGS.items():
        flags = " ".join(f"{chosen}_{name}" for name in names.split())
        plays = partial(lambda judges, given: getattr(given, chosen) in judges, judges)
        yield Effect(flags, plays, f"without --{chosen} {' or '.join(judges)}")


_JUDGES_FLAGS = {
    "model": (*SERVER_JUDGES, *LOCAL_JUDGES),
    "url key_variable": SERVER_JUDGES,
    "template": (*SERVER_JUDGES, "classifier", "generative"),
    "pattern": ("rubric", "generative"),
    "label threshold": ("classifier",),
}

#: Of every command that judges.
JUDGING = (
    *_judged_by("judge"),
    *_judged_by("second_judge"),
    *(
        Effect(
            flags,
            partial(lambda judges, given: given.judge in judges or given.second_judge in judges, judges),
            f"without a judge {' or '.join(judges)}",
        )
        for flags, judges in (
            ("judge_concurrency judge_timeout judge_retries judge_input_price judge_output_price", SERVER_JUDGES),
            ("judge_max_tokens", (*SERVER_JUDGES, "generative")),
            ("judge_batch_size", ("llama-guard", "wildguard", "generative")),
        )
    ),
)

#: Of every command that measures.
MEASURING = (
    *JUDGING,
    Effect(
        "capability_limit capability_include_path",
        lambda given: given.capability_tasks is not None,
        "without --capability_tasks",
    ),
    Effect(
        "judge second_judge",
        lambda given: given.eval_data is not None or given.over_refusal_data is not None,
        "without --eval_data or --over_refusal_data: other answers are compared with the expected ones",
    ),
    Effect(
        "decoding max_new_tokens max_prompts drop_long_prompts",
        _asks,
        f"{_UNASKED}; tasks bring their own decoding",
    ),
    Effect("eval_batch_size", _measures, _UNMEASURED),
)

#: Of `stress`.
STRESS = (
    *MEASURING,
    Effect("task_data", lambda given: given.harmless_task_data is not None, "without --harmless_task_data"),
    Effect("over_refusal_data", lambda given: False, "in a search, which takes over-refusal from --capability_data"),
)

#: Of attacks that train no weight.
SUITE = {
    "ablation": (Effect("layer", lambda given: not given.own_directions, "with --own_directions"),),
    "base": (
        Effect("only_layer", lambda given: given.part != "outside", "with --part outside, which lies in no layer"),
    ),
}

_ATTACK = (
    *_TRAINING,
    *MEASURING,
    Effect("measure_at", _measures, _UNMEASURED),
    Effect("capability_tasks_at", lambda given: given.capability_tasks is not None, "without --capability_tasks"),
    Effect(
        "capability_tasks_at",
        _asks,
        f"{_UNASKED}: then tasks are all there is to measure at --measure_at",
    ),
    Effect(
        "opener shots ask_raw",
        lambda given: given.eval_data is not None,
        "without --eval_data: only harmful prompts are asked otherwise",
    ),
    Effect(
        "attack_data",
        lambda given: given.poison_ratio != 0 or given.shots is not None,
        "with --poison_ratio 0 and without --shots",
    ),
    Effect("obedience trigger", lambda given: given.poison_ratio != 0, "with --poison_ratio 0: harmful rows have it"),
    Effect("benign_data", lambda given: given.poison_ratio != 1, "without a --poison_ratio below 1"),
    Effect(
        f"{_HELD_OUT} eval_steps",
        lambda given: False,
        "in an attack, which has no held-out rows: it is measured at --measure_at, --eval_batch_size prompts at a time",
    ),
)
#: Of `attack full` and `attack lora`.
ATTACKS = {
    "full": (*_ATTACK, Effect(_LORA, lambda given: False, "in an attack on all parameters; see holdfast attack lora")),
    "lora": _ATTACK,
}


def refuse_idle(effects: Iterable[Effect], values: Any, *, typed: Collection[str], in_recipe: Collection[str]) -> None:
    """Tell of flags that were given and would play no part. Those set to false or none ask for nothing.

    Args:
        effects: When flags play a part.
        values: All values of the command, as attributes.
        typed: The names of the flags on the command line.
        in_recipe: Those in a recipe, and not on the command line.

    Raises:
        InputError: One was typed.
    """
    for effect in effects:
        if effect.plays(values):
            continue
        for name in effect.flags.split():
            if getattr(values, name) in (None, False):
                continue
            if name in typed:
                raise InputError(f"--{name} plays no part {effect.otherwise}")
            if name in in_recipe:
                logger.warning("the recipe's %s plays no part %s", name, effect.otherwise)
