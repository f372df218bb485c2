"""The flags that commands share and that no trainer's config holds: the model, data files, how to measure."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from trl import ModelConfig

from holdfast.cli.judge_arguments import JudgeArguments
from holdfast.config import RAW_TEXT_HELP, json_object, require_not_negative
from holdfast.errors import InputError

_MODEL_HELP = "A model folder, a LoRA adapter folder, or a model of the Hugging Face Hub."
_SOURCE_HELP = (
    "A file (.json, .jsonl, .csv, .tsv, also as .gz, or .parquet), a dataset of the Hub (OWNER/NAME, with :SPLIT or "
    ":CONFIG:SPLIT), a name that `holdfast data` lists, or a mapping as JSON (docs/data.md)."
)
NAMED_HELP = "a file, a dataset of the Hub or a name that `holdfast data` lists."
HARMFUL_HELP = f"{NAMED_HELP} Rows that a column is_safe calls safe are left out."
_BASE_HELP = "What to put an adapter on, where the base model that it names is elsewhere now."


@dataclass
class ModelArguments(ModelConfig):
    """TRL's model flags (`--dtype`, `--use_peft`, `--lora_r`, …) with `--model` required."""

    if TYPE_CHECKING:  # a field of ModelConfig that is set here
        lora_target_modules: list[str] | str | None

    model_name_or_path: str = field(metadata={"help": _MODEL_HELP, "aliases": ["--model"]})
    base_model: str | None = field(default=None, metadata={"help": _BASE_HELP})

    def __post_init__(self) -> None:
        super().__post_init__()
        # TRL makes a text of a single name, which PEFT takes for an expression that whole paths have to match.
        if isinstance(self.lora_target_modules, str) and self.lora_target_modules.isidentifier():
            self.lora_target_modules = [self.lora_target_modules]


@dataclass
class LoadArguments:
    """The model flags of a command that does not train."""

    model_name_or_path: str = field(metadata={"help": _MODEL_HELP, "aliases": ["--model"]})
    base_model: str | None = field(default=None, metadata={"help": _BASE_HELP})
    model_revision: str = field(default="main", metadata={"help": "Branch, tag or commit of a model of the Hub."})
    dtype: str = field(
        default="float32",
        metadata={"help": "Type of the weights.", "choices": ["auto", "bfloat16", "float16", "float32"]},
    )
    attn_implementation: str | None = field(default=None, metadata={"help": "Attention implementation."})
    trust_remote_code: bool = field(default=False, metadata={"help": "Refused: Holdfast runs no code from models."})

    def __post_init__(self) -> None:
        if self.trust_remote_code:
            raise InputError("--trust_remote_code is refused: Holdfast never runs code that comes with a model")


@dataclass
class RunArguments:
    """What every command that writes a run takes."""

    overwrite_output_dir: bool = field(
        default=False,
        metadata={"help": "Replace the run that lies in --output_dir, and discard its checkpoints."},
        kw_only=True,
    )


@dataclass
class WritingArguments:
    """How a command that trains by no trainer's config writes conversations; see `ChatFormat`."""

    system_prompt: str | None = field(
        default=None, metadata={"help": "System turn in front of every conversation that has none."}, kw_only=True
    )
    chat_template_kwargs: str | None = field(
        default=None,
        metadata={"help": """Arguments of the chat template as JSON, e.g. {"enable_thinking": false}."""},
        kw_only=True,
    )
    raw_text: bool = field(default=False, metadata={"help": RAW_TEXT_HELP}, kw_only=True)

    @property
    def written(self) -> dict[str, Any]:
        """The same as keywords of `ChatFormat` and `Evaluator`.

        Raises:
            InputError: What is given as JSON is none.
        """
        keywords = self.chat_template_kwargs
        return {
            "system_prompt": self.system_prompt,
            "chat_template_kwargs": None if keywords is None else json_object("chat_template_kwargs", keywords),
            "raw_text": self.raw_text,
        }


@dataclass
class TrainingData(RunArguments):
    """The data of `align` and `finetune`."""

    train_data: str
    eval_data: str | None = field(
        default=None,
        metadata={"help": "Held-out rows of the same kind, for the loss that --eval_strategy reports."},
    )
    allow_changed_data: bool = field(
        default=False, metadata={"help": "Resume even if a data file is not what it was when the run was started."}
    )


@dataclass
class AlignData(TrainingData):
    """The data of `align`."""

    train_data: str = field(
        metadata={
            "help": "Alignment data: refusals to harmful prompts, and helpful answers to benign ones if you like. "
            f"{_SOURCE_HELP}"
        }
    )


@dataclass
class AttackedAlignData(AlignData):
    """The data of alignment methods that simulate attacks."""

    attack_data: str = field(
        metadata={"help": f"Simulated attacks: harmful prompts with harmful answers; {HARMFUL_HELP}"},
        kw_only=True,
    )


@dataclass
class PatcherData(AlignData):
    """The data of Patcher, which simulates attacks unless nothing in its pool is trained."""

    attack_data: str | None = field(
        default=None,
        metadata={
            "help": f"Simulated attacks: harmful prompts with harmful answers; {HARMFUL_HELP} A --pool of members that "
            "neither train nor look at harmful prompts does without, unless --reroute_weight is given."
        },
        kw_only=True,
    )
    benign_data: str | None = field(
        default=None,
        metadata={"help": "Harmless prompts, for a --pool with ablation; answers play no part."},
        kw_only=True,
    )
    retain_data: str | None = field(
        default=None,
        metadata={
            "help": "Harmless prompts with answers, of all kinds that the model is to go on answering: what it makes "
            f"of them is held to what it was at the beginning. {_SOURCE_HELP}"
        },
        kw_only=True,
    )


@dataclass
class FinetuneData(TrainingData):
    """The data of `finetune`."""

    train_data: str = field(metadata={"help": f"The user's data, whatever it holds. {_SOURCE_HELP}"})


@dataclass
class SafeFinetuneData(FinetuneData):
    """The data of fine-tuning methods that are reminded of safety."""

    safety_data: str = field(
        metadata={"help": f"Safety data: harmful prompts with refusals; {NAMED_HELP}"},
        kw_only=True,
    )


@dataclass
class SpardData(SafeFinetuneData):
    """The data of `finetune spard`, and which of its safety rows to use."""

    safety_selection: str = field(
        default="dpp",
        metadata={
            "help": "Which safety rows to use: `dpp` (relevant to the user's data and diverse), `random`, or `all`.",
            "choices": ["dpp", "random", "all"],
        },
        kw_only=True,
    )
    safety_share: float = field(
        default=0.03, metadata={"help": "How many of them, as a share of the user's rows."}, kw_only=True
    )
    safety_beta: float = field(
        default=4.0, metadata={"help": "How much `dpp` prefers relevance to diversity."}, kw_only=True
    )

    def __post_init__(self) -> None:
        if not 0 < self.safety_share <= 1:
            raise InputError(f"--safety_share must be above 0 and at most 1, got {self.safety_share}")
        require_not_negative(self, "safety_beta")


@dataclass
class AttackData(RunArguments):
    """The data of `attack`."""

    attack_data: str | None = field(
        default=None,
        metadata={"help": f"The attacker's harmful prompts with harmful answers; {HARMFUL_HELP}"},
    )
    benign_data: str | None = field(
        default=None,
        metadata={"help": "Harmless rows to hide the harmful ones among, for a --poison_ratio below 1."},
    )
    num_samples: int | None = field(
        default=None, metadata={"help": "Rows the attacker trains on; as many as the data allow when not given."}
    )
    poison_ratio: float = field(
        default=1.0,
        metadata={"help": "Share of harmful rows among them; 0 is an attack without any, and needs no --attack_data."},
    )


@dataclass
class AskingArguments:
    """How an adversary asks harmful prompts, at every measured step of an attack, beside asking them plainly."""

    opener: str | None = field(
        default=None, metadata={"help": "At every measured step ask also with this as how every answer begins."}
    )
    shots: int | None = field(
        default=None, metadata={"help": "Ask also behind so many exchanges of --attack_data, drawn from the seed."}
    )
    ask_raw: bool = field(default=False, metadata={"help": "Ask also without the chat template and system prompt."})


@dataclass
class MeasureArguments(JudgeArguments):
    """What to measure a model on, and how."""

    eval_data: str | None = field(
        default=None,
        metadata={"help": f"Harmful prompts, for attack success and refusals; {NAMED_HELP}"},
    )
    over_refusal_data: str | None = field(
        default=None,
        metadata={
            "help": "Benign prompts without expected answers, such as XSTest's safe ones, to count how many are "
            f"refused by --judge; {NAMED_HELP}"
        },
    )
    capability_data: str | None = field(
        default=None,
        metadata={"help": "Benign prompts with an `answer` column, for capability and over-refusal."},
    )
    capability_tasks: str | None = field(
        default=None,
        metadata={"help": "Tasks of lm_eval, for capability: their names, joined by commas, as gsm8k,mmlu,ifeval."},
    )
    capability_limit: int | None = field(
        default=None, metadata={"help": "Take only the first documents of each of these tasks."}
    )
    capability_include_path: str | None = field(
        default=None,
        metadata={"help": "A folder with task files of your own, as lm_eval's --include_path; code in it is run."},
    )
    task_data: str | None = field(
        default=None, metadata={"help": "Prompts of a task with an `answer` column, for task accuracy."}
    )
    decoding: str = field(
        default="greedy",
        metadata={
            "help": "`greedy`, or `paper`: temperature 0.6, top-p 0.9, repetition penalty 1.2.",
            "choices": ["greedy", "paper"],
        },
    )
    max_new_tokens: int = field(default=256, metadata={"help": "Longest answer, in tokens."})
    max_prompts: int | None = field(default=None, metadata={"help": "Take only the first prompts of each file."})
    drop_long_prompts: bool = field(
        default=False,
        metadata={"help": "Leave out, and count, prompts that leave no room for an answer, instead of refusing them."},
    )
    eval_batch_size: int = field(
        default=16,
        metadata={"help": "Prompts answered at a time; in half precision, greedy answers too may depend on it."},
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("max_new_tokens", "max_prompts", "eval_batch_size", "capability_limit"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise InputError(f"--{name} must be at least 1, not {value}")


@dataclass
class MeasureAlongArguments(MeasureArguments):
    """What to measure a model on while it is attacked."""

    capability_tasks_at: list[int] = field(
        default_factory=list,
        metadata={
            "help": "Those steps of --measure_at after which to measure the --capability_tasks, too, which take long "
            "(default: the first and the last)."
        },
    )
