"""The settings of Patcher, sequential and parallel."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from holdfast.alignment.pool import BEGUN, Pool
from holdfast.attacks.ablation import Ablation
from holdfast.attacks.back_to_base import BackToBase
from holdfast.config import LARGEST, DefenseConfig, json_object, require_not_negative, require_positive
from holdfast.data.refusals import REFUSAL_HELP
from holdfast.errors import InputError

ESTIMATORS = ("exact", "sampled")
"""How the gradient of an update is had: in two passes, or in one of the two by a coin."""


@dataclass
class PatcherConfig(DefenseConfig):
    """Configuration of `PatcherTrainer`.

    Args:
        alpha: Weight α of the gradient under attack, 0 to 1.
        attack_steps: Length k₁ of a simulated attack, in attacker steps.
        attack_every: Updates k₂ of the defender between attacks; the first so many are plain SFT.
        attack_learning_rate: The attacker's constant rate; by default the defender's.
        attack_batch_size: Rows per device and attacker step; by default those of a whole window of the defender.
        attack_weight_decay: The attacker's weight decay.
        estimator: "exact", both gradients an update, or "sampled", one of them by a coin of probability `alpha`.
        attack_scale: The least and the greatest factor that the attack vector is taken times.
        pool: Which attacks δ is drawn from, as `holdfast.alignment.pool` says, a mapping or JSON; None: the one attack
            that the settings above describe.
        base: The public base model that the pool's `base` interpolates towards: a folder or a Hub id.
        refusal: How the pool's `prefill` refuses: a text, a file with one text per line, or a column of the attack
            data.
        suffixes: What about half of all rows, drawn by the seed, end their prompts with, one text each.
        retain_weight: Weight λ of R, where there are rows to retain.
        retain_alpha: Which share κ of it is taken under attack, R(θ + s·δ; K), 0 to 1.
        origin_decay: Rate ρ at which every update takes the weights back to θ₀, where there are rows to retain; as a
            weight decay, it is taken times the learning rate.
        reroute_weight: Weight μ of C(θ + s·δ; H), H being the attacker's rows; 0: nothing is rerouted.
        reroute_layers: How many of the last decoder layers C is taken of, n; None: all.

    Raises:
        InputError: A setting out of its range; the message names it.
    """

    alpha: float = field(default=0.5, metadata={"help": "Weight of the gradient under attack, 0 to 1."})
    attack_steps: int = field(default=300, metadata={"help": "Length of a simulated attack, in attacker steps."})
    attack_every: int = field(
        default=1000, metadata={"help": "Updates between simulated attacks; the first so many are plain SFT."}
    )
    attack_learning_rate: float | None = field(
        default=None, metadata={"help": "The attacker's constant learning rate; by default the defender's."}
    )
    attack_batch_size: int | None = field(
        default=None, metadata={"help": "Rows per device and attacker step; by default the defender's whole window."}
    )
    attack_weight_decay: float = field(default=0.01, metadata={"help": "The attacker's weight decay."})
    estimator: str = field(
        default="exact",
        metadata={
            "help": "Both gradients an update, or one of them by a coin of probability --alpha, at the price of SFT.",
            "choices": list(ESTIMATORS),
        },
    )
    attack_scale: list[float] = field(
        default_factory=lambda: [1.0, 1.0],
        metadata={
            "help": "Least and greatest of the factor, drawn every update, that the attack vector is taken times."
        },
    )

    pool: dict[str, Any] | str | None = field(
        default=None,
        metadata={
            "help": "Which attacks to train against, as JSON or a recipe's mapping from members to weights or to "
            'mappings with a weight and knobs, e.g. {"fine-tuning": 0.6, "ablation": 0.4} (docs/methods.md).'
        },
    )
    base: str | None = field(
        default=None, metadata={"help": "The public base model, for a --pool with base: a folder or of the Hub."}
    )
    refusal: str | None = field(default=None, metadata={"help": f"For a --pool with prefill. {REFUSAL_HELP}"})
    suffixes: list[str] | None = field(
        default=None,
        metadata={
            "help": 'Texts that prompts may end with, such as "It is for a friend.": half of all rows, harmful and '
            "harmless, ask with one of them, so that refusing does not hang on how a prompt ends."
        },
    )
    retain_weight: float = field(
        default=0.5, metadata={"help": "How much the rows of --retain_data hold the model to what it made of them."}
    )
    retain_alpha: float = field(
        default=0.0,
        metadata={"help": "Which share of what --retain_data asks for is taken under attack, 0 to 1."},
    )
    origin_decay: float = field(
        default=0.0,
        metadata={
            "help": "Weight decay towards the weights that the run began with, as a multiple of the learning rate; "
            "needs --retain_data."
        },
    )
    reroute_weight: float = field(
        default=0.0,
        metadata={
            "help": "How much the rows of --attack_data lead the model away, also under attack, from what it made of "
            "them; needs --retain_data."
        },
    )
    reroute_layers: int | None = field(
        default=None,
        metadata={"help": "Of how many layers, counted from the last, --reroute_weight asks that; by default of all."},
    )

    def __post_init__(self) -> None:
        """Check the ranges."""
        if isinstance(self.pool, str):
            self.pool = json_object("pool", self.pool)
        super().__post_init__()
        attacks = Pool.of(self.pool).attacks()
        for name, attack in (("base", BackToBase.name), ("refusal", BEGUN)):
            if attack in attacks and getattr(self, name) is None:
                raise InputError(f"--pool: {attack} needs --{name}")
        if self.suffixes is not None and not (self.suffixes and all(text.strip() for text in self.suffixes)):
            raise InputError("--suffixes has an empty text, or none at all; expected texts that prompts may end with")
        for name in ("alpha", "retain_alpha"):
            if not 0 <= getattr(self, name) <= 1:
                raise InputError(f"--{name} must lie between 0 and 1, got {getattr(self, name)}")
        require_positive(
            self, "attack_steps", "attack_every", "attack_learning_rate", "attack_batch_size", "retain_weight"
        )
        require_positive(self, "reroute_layers")
        require_not_negative(self, "attack_weight_decay", "reroute_weight", "origin_decay")
        if self.origin_decay * self.learning_rate > 1:
            raise InputError(
                f"--origin_decay {self.origin_decay:g} at --learning_rate {self.learning_rate:g} would take an update "
                "past the weights that the run began with; their product must not be above 1"
            )
        if self.estimator not in ESTIMATORS:
            raise InputError(f"--estimator must be {' or '.join(ESTIMATORS)}, got {self.estimator}")
        given: Any = self.attack_scale
        bounds = given if isinstance(given, list | tuple) else [given]
        if (
            len(bounds) != 2
            or not all(isinstance(bound, int | float) for bound in bounds)
            or not 0 <= bounds[0] <= bounds[1] <= LARGEST
        ):
            raise InputError(
                "--attack_scale takes two numbers, the least factor and the greatest, the least not below 0 and not "
                f"above the greatest; got {' '.join(map(str, bounds))}"
            )

    def require_data(self, *, attack: bool, benign: bool, retain: bool) -> None:
        """See that there are the data that these settings take, beside what simulated attacks train on.

        Args:
            attack: Whether there are harmful rows.
            benign: Whether there are harmless prompts for ablation.
            retain: Whether there are rows to retain.

        Raises:
            InputError: There are not; one sentence, with the flag that is missing.
        """
        attacks = Pool.of(self.pool).attacks()
        if Ablation.name in attacks:
            for needed, held in (("harmful_prompts", attack), ("harmless_prompts", benign)):
                if not held:
                    raise Ablation.lacks(needed)
        if BEGUN in attacks and not attack:
            raise InputError(f"--pool: {BEGUN} needs harmful prompts; give --attack_data")
        if self.origin_decay > 0 and not retain:
            raise InputError("--origin_decay needs --retain_data, with which the weights of the beginning are kept")
        if self.reroute_weight > 0 and not (attack and retain):
            raise InputError(
                "--reroute_weight needs --attack_data, whose rows are led elsewhere, and --retain_data, by which all "
                "else stays"
            )
