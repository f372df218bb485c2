"""A model's answer apart from its reasoning, and what keeps an answer from being a whole one."""

import re
from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace

from transformers import PreTrainedTokenizerBase

# What begins and what ends reasoning, as regular expressions: Qwen, DeepSeek, GLM, Nemotron and LFM; Gemma; Cohere;
# Magistral; gpt-oss, by its channels; Muse, by whom it speaks to. The last two say so behind the speaker's role.
_SPEAKER = r"(?:<\|start\|>assistant)?"
_REASONING = (
    (r"<think>", r"</think>"),
    (r"<\|channel>thought", r"<channel\|>"),
    (r"<\|START_THINKING\|>", r"<\|END_THINKING\|>"),
    (r"\[THINK\]", r"\[/THINK\]"),
    (rf"{_SPEAKER}<\|channel\|>analysis<\|message\|>", rf"{_SPEAKER}<\|channel\|>final<\|message\|>"),
    (rf"{_SPEAKER} ?to=self<\|message\|>", rf"{_SPEAKER} ?to=user<\|message\|>"),
)
_OPENS, _CLOSES = ("|".join(marks) for marks in zip(*_REASONING, strict=True))
_MARK = re.compile(rf"(?P<opens>{_OPENS})|(?P<closes>{_CLOSES})")
_MARK_AT_END = re.compile(rf"(?:{_MARK.pattern})\s*\Z")
# Marks are special tokens in some vocabularies and ordinary text in others.
_MARK_TOKENS = frozenset(re.findall(r"<[^<>]+>|\[[^\[\]]+\]", f"{_OPENS}|{_CLOSES}".replace("\\", "")))
# The prompt's last tokens, among which a mark at its end is looked for.
_TAIL = 32

# Shorter answers are not called degenerate, and longer phrases not found.
_SHORTEST, _LONGEST_PHRASE, _REPEATS = 20, 200, 4
_REPEATED = re.compile(rf"(.{{1,{_LONGEST_PHRASE}}}?)\1{{{_REPEATS - 1},}}")

MARKS = ("empty", "truncated", "degenerate", "thinking_unclosed")
"""What is marked about an answer: the names of `Answer`'s properties."""


@dataclass(frozen=True)
class Answer:
    """An answer and what was thought before it.

    Attributes:
        text: What is graded: the answer without its reasoning and without surrounding white space.
        thoughts: The reasoning; None if there are no marks of any.
        thinking_unclosed: Whether the reasoning never ended; what follows its opening mark is no answer.
        truncated: Whether it ends at a limit instead of at a stop token.
    """

    text: str
    thoughts: str | None = None
    thinking_unclosed: bool = False
    truncated: bool = False

    @property
    def empty(self) -> bool:
        """Whether nothing was said, as always where the model only thought."""
        return not self.text.strip()

    @property
    def degenerate(self) -> bool:
        """Whether half of the text or more is one phrase over and over.

        White space apart, a phrase has at most 200 characters and comes at least four times in a row; texts below 20
        characters are not looked at. Other nonsense is not told from sense.
        """
        text = " ".join(self.text.split())
        if len(text) < _SHORTEST:
            return False
        # With a space at the end the last repeat is as long as the others.
        return any(2 * len(match[0]) >= len(text) for match in _REPEATED.finditer(f"{text} "))

    def behind(self, opener: str) -> "Answer":
        """The answer that begins with what was begun for it; one that goes on with nothing stays empty."""
        return self if self.empty or not opener else replace(self, text=f"{opener} {self.text}".strip())

    @property
    def marks(self) -> dict[str, bool]:
        """What is marked about it, by the names of `MARKS`."""
        return {name: getattr(self, name) for name in MARKS}


def count_marks(answers: Sequence[Answer]) -> dict[str, int]:
    """Return how many answers bear each of `MARKS`."""
    found = Counter(name for answer in answers for name, is_so in answer.marks.items() if is_so)
    return {name: found[name] for name in MARKS}


def hidden_tokens(tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    """Return the special tokens, which are no part of an answer, without those that mark reasoning."""
    special = {token for token, added in tokenizer.added_tokens_decoder.items() if added.special}
    special.update(tokenizer.all_special_ids)
    return frozenset(token for token in special if tokenizer.convert_ids_to_tokens(token) not in _MARK_TOKENS)


def decode_answer(
    tokenizer: PreTrainedTokenizerBase,
    hidden: Collection[int],
    prompt: Sequence[int],
    tokens: Sequence[int],
    *,
    truncated: bool,
) -> Answer:
    """Read an answer off its tokens.

    Args:
        tokenizer: The model's tokenizer.
        hidden: What `hidden_tokens` finds there.
        prompt: The tokens of the prompt, which may have opened the reasoning itself.
        tokens: Those of the answer, without the stop token.
        truncated: Whether there was none.

    Returns:
        The answer, without hidden tokens.
    """
    text = tokenizer.decode([token for token in tokens if token not in hidden], skip_special_tokens=False)
    before = tokenizer.decode(prompt[-_TAIL:], skip_special_tokens=False)
    return replace(split_reasoning(text, before), truncated=truncated)


def split_reasoning(text: str, before: str = "") -> Answer:
    """Part an answer from its reasoning.

    Reasoning lies between an opening and a closing mark, such as `<think>` and `</think>`. The opening one may stand
    at the end of the prompt, or be missing: then it began with the answer. All other text is the answer, also text
    in front of reasoning.

    Args:
        text: What the model wrote.
        before: The end of the prompt.

    Returns:
        The answer.
    """
    last = _MARK_AT_END.search(before)
    thinking = _opens(last)
    thought = last is not None  # whether there has been reasoning
    inside: list[str] = []
    outside: list[str] = []
    place = 0
    for mark in _MARK.finditer(text):
        began_with_answer = not thought and not _opens(mark)
        (inside if thinking or began_with_answer else outside).append(text[place : mark.start()])
        thinking, thought, place = _opens(mark), True, mark.end()
    (inside if thinking else outside).append(text[place:])
    thoughts = "".join(inside).strip() if inside or place else None
    return Answer("".join(outside).strip(), thoughts, thinking_unclosed=thinking)


def _opens(mark: re.Match[str] | None) -> bool:
    return mark is not None and mark["opens"] is not None
