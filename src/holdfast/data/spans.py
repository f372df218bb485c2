"""Where the answers stand in a rendered conversation, whatever the chat template does around them.

No template says so by itself, so it is asked: turns are rendered with a *marker* in the place of their text. What
surrounds the markers is the template's own; between it stands, in the real rendering, the text of each turn as the
template shows it. Where a template looks into the texts (thoughts, tool calls), each answer is marked alone, and what
the two renderings have in common at both ends is not the answer.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from holdfast.data.formats import Conversation, Message, text_of
from holdfast.errors import InputError

Span = tuple[int, int]
"""From the first character of an answer to the one after its end token."""

Render = Callable[..., str]
"""Renders a conversation, with the generation prompt or without, and knows its name; InputError if that is refused."""

_MARKER = re.compile("\ue000([0-9]+)\ue001")  # characters that no text has
_REASONING = ("reasoning_content", "thinking", "reasoning")
_REMEMBERED = 1000


@dataclass(frozen=True)
class Located:
    """A rendered conversation.

    Attributes:
        text: The rendering.
        answers: The span of every turn that is trained on.
        added: What stands before an answer and not at the end of its prompt, and the other way round, for the first
            answer where these differ; None where training and generation see the same.
    """

    text: str
    answers: list[Span]
    added: tuple[str, str] | None


class AnswerFinder:
    """Finds answers in what one template renders.

    Args:
        render: The template.
        probe: The template without what the run adds to conversations, to be asked for its tokens.
        special: The tokens of the tokenizer that are never cut.
        eos: Its end-of-sequence token.

    Attributes:
        closing: What the template writes after an answer, up to its end token; empty if it writes none.
        own: The tokens by which the template opens and ends turns.
    """

    def __init__(self, render: Render, probe: Render, special: Sequence[str], eos: str | None) -> None:
        self._render, self._probe = render, probe
        longest_first = sorted(filter(None, special), key=len, reverse=True)
        self._special = re.compile("|".join(map(re.escape, longest_first)) or "(?!)")
        self._shapes: dict[str, _Shape | None] = {}
        self._openers = {token for token in self._opening_tokens() if token != eos}
        self.closing = self._closing()
        self.own = sorted(filter(None, {*self._openers, self.closing.strip()}))

    def locate(self, talk: Conversation, where: str) -> Located:
        """Render a conversation and find the answers that are trained on.

        Args:
            talk: The conversation.
            where: Its name for messages.

        Raises:
            InputError: The template refuses it, or does not show a part of it.
        """
        text = self._render(talk, False, where)
        self.require_shown(talk, text, where)
        shape = self._shape_of(talk)
        found = shape and shape.match(text, [text_of(turn) for turn in talk.messages])
        if shape and found:
            answers = [(found[i][0] - shape.leads[i], found[i][1]) for i in talk.trained]
            return Located(text, [self._closed(text, *answer, where) for answer in answers], shape.added)
        answers, added = [], None
        for i in talk.trained:
            turn = talk.messages[i]
            start, end, prompt = self._one(talk, i, text, where)
            lead, difference = _difference(text[:start], prompt)
            added = added or difference
            answers.append(self._closed(text, start - lead, end, None if turn.get("tool_calls") else where))
        return Located(text, answers, added)

    def require_shown(self, talk: Conversation, text: str, where: str) -> None:
        """Raise InputError unless the turns and tools of a conversation are in its rendering, or of its prompt."""
        shape = self._shape_of(talk)
        for i, turn in enumerate(talk.messages):
            if i in talk.trained and not _is_plain(turn):
                continue  # its place is looked for, and what stands there compared
            if shape is not None and _is_plain(turn):
                shown = i in shape.order
            else:
                shown = all(squeezed(part) in squeezed(text) for part in (_thoughts(turn)[1], *_calls(turn)))
            if not shown:
                lists = shape is not None and not shape.order
                raise InputError(
                    f"turn {i + 1} of {where} ({turn['role']}) is not shown by the chat template, so it would be lost; "
                    "leave it out or give it another role"
                    + (" (or write contents as lists of text parts, as some templates want them)" if lists else "")
                )
        for name in map(_name, talk.tools or ()):
            if name not in text:
                raise InputError(f"{where} has the tool {name}, which the chat template does not show; leave tools out")

    def _closing(self) -> str:
        for content in _CONTENTS:
            talk = Conversation([_turn("user", content(0)), _turn("assistant", content(1))])
            try:
                text = self._probe(talk, False)
            except InputError:
                continue
            if len(marks := list(_MARKER.finditer(text))) == 2:
                end = marks[1].end()
                return text[end : self._closed(text, end, end)[1]]
        return ""

    # ------------------------------------------------------------------ all turns at once

    def _shape_of(self, talk: Conversation) -> _Shape | None:
        """What the template writes around turns such as these; None if it refuses them with other texts."""
        turns = [_with_text(turn, _marker(i)) if _is_plain(turn) else turn for i, turn in enumerate(talk.messages)]
        marked = replace(talk, messages=turns)
        key = json.dumps([marked.messages, marked.tools, marked.chat_template_kwargs], default=str)
        if key not in self._shapes:
            if len(self._shapes) >= _REMEMBERED:
                self._shapes.clear()
            self._shapes[key] = self._ask(marked)
        return self._shapes[key]

    def _ask(self, marked: Conversation) -> _Shape | None:
        try:
            text = self._render(marked, False)
            marks = list(_MARKER.finditer(text))
            order = [int(mark[1]) for mark in marks]
            leads, added = {}, None
            for i in marked.trained:
                if i in order:
                    shown = text[: marks[order.index(i)].start()]
                    leads[i], difference = _difference(shown, self._render(marked.until(i), True))
                    added = added or difference
        except InputError:
            return None
        ends = [0, *(mark.end() for mark in marks)]
        starts = [*(mark.start() for mark in marks), len(text)]
        literals = [text[end:start] for end, start in zip(ends, starts, strict=True)]
        return _Shape(literals, order, leads, added)

    # ------------------------------------------------------------------ one turn alone

    def _one(self, talk: Conversation, i: int, text: str, where: str) -> tuple[int, int, str]:
        """Start and end of an answer without its end token, and the prompt that it answers."""
        turn = talk.messages[i]
        prompt = self._render(talk.until(i), True, where)
        start, end, headed = self._between(talk, i, text) or (len(prompt), len(text), False)
        if not headed and text.startswith(prompt):
            start = len(prompt)  # what opens the answer is the answer's own: thoughts, or the address of a call
        if turn.get("tool_calls"):
            end = self._until_here(talk, i, text) or end
        thoughts, answer = _thoughts(turn)
        shown = squeezed(text[start:end])
        as_it_stands = shown in (squeezed(text_of(turn)), squeezed(answer))
        lost = [part for part in (thoughts, answer, *_calls(turn)) if squeezed(part) not in shown]
        if lost or not (as_it_stands or thoughts or turn.get("tool_calls")):
            raise InputError(
                f"turn {i + 1} of {where} cannot be trained on, since the chat template does not show its "
                f"{'thoughts' if lost == [thoughts] else 'text'}; leave out what it does not show, give the turn a "
                "weight of 0, or end the conversation there"
            )
        return start, end, prompt

    def _between(self, talk: Conversation, i: int, text: str) -> tuple[int, int, bool] | None:
        """The answer between what a rendering with a marker in its place has in common with the real one.

        Returns:
            Start, end, and whether all that precedes the marker precedes the answer, too; None if the template refuses
            such a turn.
        """
        turn = {key: value for key, value in talk.messages[i].items() if key not in (*_REASONING, "tool_calls")}
        for content in _CONTENTS:
            marked = [*talk.messages[:i], {**turn, "content": content(i)}, *talk.messages[i + 1 :]]
            try:
                other = self._render(replace(talk, messages=marked), False)
            except InputError:
                continue
            mark = _MARKER.search(other)
            if mark is not None:
                common = _common(text, other[: mark.start()])
                start = self._whole(text, common)
                end = len(text) - _common(text[start:][::-1], other[mark.end() :][::-1])
                return start, max(start, self._whole(text, end)), common == mark.start()
        return None

    def _until_here(self, talk: Conversation, i: int, text: str) -> int | None:
        """Where a turn ends without its end token, if later turns leave its rendering as it is."""
        until = self._render(talk.until(i + 1), False).rstrip()
        if not text.startswith(until):
            return None
        last = [match for match in self._special.finditer(until) if match.end() == len(until)]
        return last[0].start() if last else len(until)

    # ------------------------------------------------------------------ tokens around answers

    def _closed(self, text: str, start: int, end: int, where: str | None = None) -> Span:
        """The span of an answer with its end token, if the template writes one."""
        after = len(text) - len(text[end:].lstrip())
        match = self._special.match(text, after)
        if match is None and where is not None and self.closing:
            raise InputError(
                f"the chat template writes {text[end:][:20]!r} behind the answers of {where}, and no end token"
            )
        return (start, match.end()) if match and match[0] not in self._openers else (start, end)

    def _whole(self, text: str, position: int) -> int:
        """The position, or the start of the special token that it would cut."""
        for match in self._special.finditer(text, max(0, position - 200)):
            if match.start() >= position:
                break
            if match.end() > position:
                return match.start()
        return position

    def _opening_tokens(self) -> set[str]:
        """The tokens that open a turn, which after an answer are not its end."""
        for content in _CONTENTS:
            talk = Conversation([_turn("user", content(0))])
            try:
                text, prompt = self._probe(talk, False), self._probe(talk, True)
            except InputError:
                continue
            if (mark := _MARKER.search(text)) is not None:
                header = prompt[self._whole(prompt, _common(text, prompt)) :]
                before = self._special.findall(text, 0, mark.start())
                return {*self._special.findall(header), *before[-1:]}
        return set()


@dataclass(frozen=True)
class _Shape:
    """What a template writes around texts of turns: a literal before each, in the order shown, and one at the end."""

    literals: list[str]
    order: list[int]
    leads: dict[int, int]
    added: tuple[str, str] | None

    def match(self, text: str, contents: Sequence[str]) -> dict[int, Span] | None:
        """The span of every turn's text, if this is what the template wrote around each of them, once."""
        if sorted(self.order) != list(range(len(contents))) or not text.startswith(self.literals[0]):
            return None
        position, found = len(self.literals[0]), {}
        for number, i in enumerate(self.order):
            following = self.literals[number + 1]
            for shown in _trimmed(contents[i]):
                end = position + len(shown)
                if text.startswith(shown, position) and text.startswith(following, end):
                    break
            else:
                return None
            found[i], position = (position, end), end + len(following)
        return found if position == len(text) else None


def _is_plain(turn: Message) -> bool:
    """Whether a turn is nothing but its text."""
    return turn.get("content") is not None and not turn.get("tool_calls") and not _thoughts(turn)[0]


def _calls(turn: Message) -> list[str]:
    """The names of the tools that a turn calls."""
    return [_name(call) for call in turn.get("tool_calls") or ()]


def _marker(i: int) -> str:
    return f"\ue000{i}\ue001"


# The two ways in which templates want a text.
_CONTENTS: tuple[Callable[[int], Any], ...] = (_marker, lambda i: [{"type": "text", "text": _marker(i)}])


def _turn(role: str, content: Any) -> Message:
    return {"role": role, "content": content}


def _with_text(turn: Message, text: str) -> Message:
    return {**turn, "content": text if isinstance(turn["content"], str) else [{"type": "text", "text": text}]}


def _trimmed(content: str) -> tuple[str, ...]:
    """A text as templates show it: as it stands, or without the space around it."""
    return content, content.strip(), content.strip("\n"), content.lstrip(), content.rstrip()


def _thoughts(turn: Message) -> tuple[str, str]:
    """An assistant's thoughts, in a field of their own or before `</think>`, and its answer."""
    text = text_of(turn)
    if turn["role"] != "assistant":
        return "", text
    apart = next((turn[key] for key in _REASONING if turn.get(key)), None)
    if apart is not None:
        return apart, text
    thoughts, _, answer = text.rpartition("</think>")
    return thoughts.replace("<think>", "").strip(), answer


def _name(tool: Mapping[str, Any]) -> str:
    return str(tool.get("function", tool).get("name", ""))


def squeezed(text: str) -> str:
    """A text without its white space."""
    return "".join(text.split())


def _common(a: str, b: str) -> int:
    """How many characters two texts begin with in common."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def _difference(shown: str, prompt: str) -> tuple[int, tuple[str, str] | None]:
    """How what precedes an answer differs from its prompt: white space that the answer begins with, or more than that.

    Returns:
        So much white space, which is the model's to write, and what differs otherwise, if anything does.
    """
    common = _common(shown, prompt)
    more, less = shown[common:], prompt[common:]
    if not less and not more.strip():
        return len(more), None
    return 0, (more, less)
