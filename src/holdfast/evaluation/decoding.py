"""How answers are decoded: greedily, or with the sampling of the Patcher paper."""

from dataclasses import dataclass

from holdfast.errors import InputError


@dataclass(frozen=True)
class Decoding:
    """Decoding settings, complete: what a model brings in its own `generation_config` plays no part.

    Attributes:
        max_new_tokens: Most tokens of an answer.
        do_sample: Whether to sample; greedy otherwise, and then temperature and top-p play no part.
        temperature: What logits are divided by before sampling.
        top_p: Probability mass of the tokens that are sampled from.
        repetition_penalty: What the logits of tokens seen before are penalised by; 1 is no penalty.
    """

    max_new_tokens: int = 256
    do_sample: bool = False
    temperature: float = 1.0
    top_p: float = 1.0
    repetition_penalty: float = 1.0

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise InputError(f"--max_new_tokens must be positive, but is {self.max_new_tokens}")
        if not self.temperature > 0:
            raise InputError(f"--temperature must be positive, but is {self.temperature}")
        if not 0 < self.top_p <= 1:
            raise InputError(f"--top_p must lie in (0, 1], but is {self.top_p}")
        if not self.repetition_penalty > 0:
            raise InputError(f"--repetition_penalty must be positive, but is {self.repetition_penalty}")


GREEDY = Decoding()
"""The most probable token, always: one answer per prompt, the same on every run."""

PAPER = Decoding(do_sample=True, temperature=0.6, top_p=0.9, repetition_penalty=1.2)
"""The sampling with which the Patcher paper generates its answers."""

DECODINGS = {"greedy": GREEDY, "paper": PAPER}
