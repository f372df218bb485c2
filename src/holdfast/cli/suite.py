"""`holdfast attack ablation|dropping|base|…|prefill|…`: an attack that trains no weight, measured before and after."""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from datasets import Dataset
from safetensors.torch import save
from transformers import PreTrainedModel

from holdfast.attacks.attack import Attack, Attacker, Prompting, whole_model
from holdfast.attacks.catalogue import ATTACKS
from holdfast.attacks.finetuning import FineTuning
from holdfast.checkpoint import discard, publish, saved_aside
from holdfast.cli.arguments import (
    HARMFUL_HELP,
    NAMED_HELP,
    LoadArguments,
    MeasureArguments,
    RunArguments,
    WritingArguments,
)
from holdfast.cli.console import say, set_up_logging, stdout
from holdfast.cli.effects import MEASURING, SUITE
from holdfast.cli.evaluate import (
    MARKER,
    make_evaluator,
    taken_prompts,
    warn_of_unclosed_thinking,
    warn_of_unjudged,
)
from holdfast.cli.parser import HoldfastParser
from holdfast.cli.runs import announce, keep_apart, load_keywords, output_dir
from holdfast.cli.tables import attack_tables, judge_records
from holdfast.config import require_positive
from holdfast.data.harmful import load_harmful_rows
from holdfast.data.load import Prompt
from holdfast.data.rendering import ChatFormat
from holdfast.errors import InputError
from holdfast.evaluation.evaluate import SCHEMA, Evaluation, Evaluator
from holdfast.evaluation.judges.cache import CACHE, Cache
from holdfast.evaluation.prompts import load_prompts
from holdfast.files import run_record, write_bytes, write_json, write_jsonl
from holdfast.models import accelerator, base_names, from_flag, load_model, load_model_and_tokenizer
from holdfast.parameters import share_moved, snapshot_on_host, trainable_parameters

#: What is written beside the record: every answer, and the vectors of a soft prompt.
SAMPLES, PREFIX = "samples.jsonl", "soft_prompt.safetensors"

#: The attacks of this module, by what they are called on the command line.
SUITE_ATTACKS: dict[str, Any] = {name: attack for name, attack in ATTACKS.items() if attack is not FineTuning}


@dataclass
class HarmfulRows:
    """What an attack that shows harmful exchanges needs."""

    attack_data: str = field(metadata={"help": f"The attacker's harmful prompts with harmful answers; {HARMFUL_HELP}"})


@dataclass
class HarmfulPrompts:
    """What an attack that looks at harmful prompts needs."""

    attack_data: str = field(
        metadata={"help": f"The attacker's harmful prompts, whose answers play no part; {NAMED_HELP}"}
    )
    batch_size: int = field(default=16, metadata={"help": "Prompts that go through the model at a time."})

    def __post_init__(self) -> None:
        require_positive(self, "batch_size")


@dataclass
class HarmlessPrompts:
    """What an attack that looks at harmless prompts, too, needs."""

    benign_data: str = field(metadata={"help": "Harmless prompts of the same style; answers play no part."})


@dataclass
class BasePath:
    """What an attack that knows the public base model needs."""

    base: str = field(metadata={"help": "The public model that the attacked one was made of."})


@dataclass
class SuiteArguments(RunArguments, WritingArguments):
    """The remaining flags of an attack that trains no weight."""

    output_dir: str = field(metadata={"help": "Folder for results.json, samples.jsonl and the attacked model."})
    seed: int = field(default=0, metadata={"help": "Of what is drawn, and of sampled decoding."})


#: The flags that give what an attack needs.
_GIVING = {
    "harmful_prompts": HarmfulPrompts,
    "harmful_rows": HarmfulRows,
    "harmless_prompts": HarmlessPrompts,
    "base": BasePath,
}


def make_parser(method: str) -> HoldfastParser:
    """Return the parser of `attack METHOD`: the model, the attack's knobs and needs, and what to measure."""
    attack = SUITE_ATTACKS[method]
    writes = "" if issubclass(attack, Prompting) else "; the attacked model lies in model/"
    needs = [_GIVING[name] for name in attack.needs]
    return HoldfastParser(
        (LoadArguments, *needs, attack, MeasureArguments, SuiteArguments),
        prog=f"holdfast attack {method}",
        description=f"{attack.__doc__.partition('. ')[0].rstrip('.')}, and measure it before and after. results.json "
        f"and samples.jsonl lie in --output_dir{writes}.",
        effects=(*SUITE.get(method, ()), *MEASURING),
    )


def run(method: str, argv: list[str]) -> int:
    """Attack a model. The model on disk stays as it is; an attacked one is saved beside the results.

    Args:
        method: A name of `SUITE_ATTACKS`.
        argv: The words after the method.

    Returns:
        The exit code.

    Raises:
        InputError: The input cannot be used; nothing has been written.
    """
    set_up_logging()
    load, *given, attack, measure, options, _ = make_parser(method).parse(argv)
    data: dict[str, Any] = {name: value for one in given for name, value in asdict(one).items()}
    if isinstance(attack, Prompting) and measure.eval_data is None:
        raise InputError(f"attack {method} changes how harmful prompts are asked: give them as --eval_data")
    source, folder = load.model_name_or_path, Path(options.output_dir)
    attacked_at = folder / "model"
    keep_apart(folder, attacked_at, source)
    if data.get("base") is not None:
        keep_apart(folder, attacked_at, data["base"])
    with output_dir(folder, marker=MARKER, overwrite=options.overwrite_output_dir):
        if attacked_at.exists() and not options.overwrite_output_dir:
            raise InputError(
                f"--output_dir {folder} holds the model of an attack that was not finished (model); choose another "
                "--output_dir or pass --overwrite_output_dir"
            )
        say(f"loading {source}")
        model, tokenizer = load_model_and_tokenizer(source, **load_keywords(load))
        for base in base_names(model):
            keep_apart(folder, attacked_at, base)
        written = ChatFormat(tokenizer, **options.written)
        evaluator = make_evaluator(measure, seed=options.seed, cache=Cache(folder / CACHE), **options.written)
        taken = taken_prompts(evaluator)
        attacker = _attacker(attack, data, written, load, options.seed, taken)
        attack.require(attacker)
        whole = whole_model(model).to(accelerator())
        started = time.monotonic()
        points: list[dict[str, Any]] = []
        samples: list[dict[str, Any]] = []
        if evaluator is not None:
            say(f"measuring {source} as it is")
            _note(points, samples, "before", evaluator(whole, tokenizer))
        origin = snapshot_on_host(whole)
        say(f"attacking {source} ({method})")
        attacked = attack(whole, attacker)
        asked = None if evaluator is None else replace(evaluator, asking=attacked.asking)
        weights_moved = share_moved(trainable_parameters(attacked.model), origin)
        if asked is not None:
            say("measuring it under attack")
            _note(points, samples, "after", asked(attacked.model, tokenizer))
        with saved_aside(folder) as aside:
            if not isinstance(attack, Prompting):
                attacked.model.save_pretrained(aside)
                tokenizer.save_pretrained(aside)
            for name in (MARKER, SAMPLES, PREFIX):  # of a run before: its results do not belong to what comes now
                (folder / name).unlink(missing_ok=True)
            if isinstance(attack, Prompting):
                discard(folder, folder.glob("model"))
            else:
                publish(aside, attacked_at)
        if asked is not None:
            write_jsonl(folder / SAMPLES, samples)
        if attacked.asking.prefix is not None:
            write_bytes(folder / PREFIX, save({"prefix": attacked.asking.prefix}))
        record = {
            "schema": SCHEMA,
            **run_record(
                {**asdict(load), **data, **asdict(attack), **asdict(measure), **asdict(options)}, options.seed
            ),
            "command": f"attack {method}",
            "model": source,
            "attack": {"method": method, **asdict(attack), **data},
            "asking": attacked.asking.record(),
            "cost": asdict(attacked.cost),
            "taken": taken,
            "evaluation": asdict(measure) if asked is not None else None,
            **judge_records(asked),
            "weights_moved": weights_moved,
            "seconds": round(time.monotonic() - started, 3),
            "points": points,
        }
        write_json(folder / MARKER, record)
        if not isinstance(attack, Prompting):
            say(f"the attack moved {weights_moved:.2%} of the weights")
        if asked is not None:
            _show(points, asked, title=f"{source} under attack ({method})")
        announce(folder, MARKER, *([SAMPLES] if asked is not None else []), *_saved(attack))
    return 0


def _attacker(
    attack: Attack, data: dict[str, Any], written: ChatFormat, load: LoadArguments, seed: int, taken: dict[str, Any]
) -> Attacker:
    """What the flags give the attacker; notes what was `taken` of the data that they name."""
    rows: Dataset | None = None
    harmful: list[Prompt] | None = None
    harmless: list[Prompt] | None = None
    base: PreTrainedModel | None = None
    if "harmful_rows" in attack.needs:
        rows, _ = load_harmful_rows(data["attack_data"], flag="--attack_data", noted=taken)
    if "harmful_prompts" in attack.needs:
        harmful = _prompts(data, "attack_data", taken)
    if "harmless_prompts" in attack.needs:
        harmless = _prompts(data, "benign_data", taken)
    if "base" in attack.needs:
        say(f"loading {data['base']}")
        with from_flag("--base"):
            base = whole_model(load_model(data["base"], dtype=load.dtype)).to(accelerator())
    return Attacker(written, harmful, rows, harmless, base, data.get("batch_size", 16), seed)


def _prompts(data: dict[str, Any], name: str, taken: dict[str, Any]) -> list[Prompt]:
    found = load_prompts(data[name], flag=f"--{name}", role="harmful", judge_name="refusal")
    taken[name] = found.taken
    return found.prompts


def _note(points: list[dict[str, Any]], samples: list[dict[str, Any]], stage: str, evaluation: Evaluation) -> None:
    points.append({"stage": stage, "attacker_loss": None, **evaluation.flat()})
    samples += [{"stage": stage, **row} for row in evaluation.samples]


def _saved(attack: Attack) -> list[str]:
    return [] if isinstance(attack, Prompting) else ["model"]


def _show(points: list[dict[str, Any]], evaluator: Evaluator, *, title: str) -> None:
    warn_of_unclosed_thinking(points)
    warn_of_unjudged((evaluator.judge, evaluator.second_judge))
    for table in attack_tables(points, evaluator, title=title, by="stage"):
        stdout.print(table)
