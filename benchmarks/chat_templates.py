"""What every chat template that TRL ships makes of conversations, and of what is trained on: docs/chat_templates.md.

    python benchmarks/chat_templates.py

For each template and shape of conversation, either the token ids are the template's own and the labelled text is the
answer and its end token, which is checked here, or a sentence says why not.
"""

from __future__ import annotations

import html
import itertools
import logging
import re
from pathlib import Path

import trl
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from holdfast.data.formats import Conversation, text_of
from holdfast.data.rendering import IGNORED, ChatFormat
from holdfast.errors import InputError
from readme import ROOT, fill_block

SHIPPED = {
    path.stem: path.read_text(encoding="utf-8")
    for path in sorted((Path(trl.__file__).parent / "chat_templates").glob("*.jinja"))
    if not path.stem.endswith("_training")  # TRL's own variants, which no model comes with
}
OTHERS = {
    "Mistral's kind": (
        "{{ bos_token }}{% for m in messages %}{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}"
        "{{ raise_exception('roles must alternate user/assistant/user/assistant/...') }}{% endif %}"
        "{% if m['role'] == 'user' %}{{ '[INST] ' + m['content'] + ' [/INST]' }}"
        "{% else %}{{ ' ' + m['content'] + eos_token }}{% endif %}{% endfor %}"
    ),
    "ChatML without markers": (
        "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    ),
    "names and line ends": (
        "{% for m in messages %}{{ m['role'] | capitalize + ': ' + m['content'] | trim + '\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'Assistant: ' }}{% endif %}"
    ),
}
TEMPLATES = {**SHIPPED, **OTHERS}

_SPECIAL = re.compile(
    r"<[|｜][^|｜<>{}'\" ]{1,40}[|｜]>|</?s>|<(?:start|end)_of_[a-z]+>|\[/?[A-Za-z_]{3,20}\]|</?think>|</?tool_call>"
    r"|<[a-z_]+\|>|<\|[a-z_]+>|<sop>"
)
_CALL = [{"type": "function", "function": {"name": "weather", "arguments": {"city": "Rome"}}}]
_TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "weather",
            "description": "The weather of a city.",
            "parameters": {
                "type": "object",
                "properties": {"city": {"type": "string", "description": "Which city."}},
                "required": ["city"],
            },
        },
    }
]


def _user(text: str) -> dict[str, object]:
    return {"role": "user", "content": text}


def _assistant(text: str, **more: object) -> dict[str, object]:
    return {"role": "assistant", "content": text, **more}


CASES = {
    "one answer": Conversation([_user("Tea?"), _assistant("Steep it.")]),
    "system turn": Conversation([{"role": "system", "content": "Be brief."}, _user("Tea?"), _assistant("Steep it.")]),
    "three answers": Conversation(
        [
            _user("Tea?"),
            _assistant("Steep it."),
            _user("Rice?"),
            _assistant("Boil it."),
            _user("Dough?"),
            _assistant("Bake it."),
        ]
    ),
    "text in parts": Conversation(
        [
            {"role": turn["role"], "content": [{"type": "text", "text": text_of(turn)}]}
            for turn in (_user("Tea?"), _assistant("Steep it."))
        ]
    ),
    "thoughts": Conversation([_user("Tea?"), _assistant("Steep it.", reasoning_content="Water, first.")]),
    "tool call": Conversation(
        [
            _user("Rome?"),
            {"role": "assistant", "tool_calls": _CALL},
            {"role": "tool", "name": "weather", "content": '{"sky": "clear"}'},
            _assistant("It is sunny."),
        ],
        _TOOLS,
    ),
}


def tokenizer_of(template: str) -> PreTrainedTokenizerFast:
    """A tokenizer of single bytes that knows the special tokens which a template writes."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={byte: i for i, byte in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    written = {"<|begin_of_text|>", "<|endoftext|>", *_SPECIAL.findall(template)}
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in sorted(written)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<|begin_of_text|>",
        eos_token="</s>" if "</s>" in written else "<|endoftext|>",
        chat_template=template,
    )


def labelled(tokenizer: PreTrainedTokenizerFast, ids: list[int], labels: list[int]) -> list[str]:
    """The stretches of text that the loss falls on."""
    assert all(label in (IGNORED, token) for token, label in zip(ids, labels, strict=True))
    stretches = itertools.groupby(zip(ids, labels, strict=True), key=lambda pair: pair[1] != IGNORED)
    return [tokenizer.decode([token for token, _ in pairs]) for trained, pairs in stretches if trained]


def outcome(written: ChatFormat, talk: Conversation) -> str | None:
    """Why a conversation cannot be trained on; None if it can, and everything is as it should be."""
    try:
        [(ids, labels)] = written.encode([("this row", talk)])
    except InputError as error:
        return str(error)
    tokenizer = written.tokenizer
    assert ids == list(tokenizer.apply_chat_template(talk.messages, tools=talk.tools)["input_ids"])
    stretches = labelled(tokenizer, ids, labels)
    answers = [turn for turn in talk.messages if turn["role"] == "assistant"]
    assert len(stretches) == len(answers), stretches
    for stretch, turn in zip(stretches, answers, strict=True):
        pieces = _SPECIAL.split(stretch)
        if turn.get("tool_calls"):
            assert [part in stretch for part in ("weather", "Rome", "clear")] == [True, True, False], stretch
        elif turn.get("reasoning_content"):
            assert re.search(f"{turn['reasoning_content']}.*{text_of(turn)}", stretch, re.DOTALL), stretch
        else:
            ends = [] if written.end_token is None else [""]
            assert [pieces[0].lstrip(), *pieces[1:]] == [text_of(turn), *ends], stretch
    return None


def table() -> str:
    """One line for every template; what is refused is a number, and its sentence stands below."""
    notes: dict[str, int] = {}
    lines = [
        "| template | " + " | ".join(CASES) + " | end token | keywords that make prompts and training alike |",
        "|---|" + "---|" * (len(CASES) + 2),
    ]
    for name, template in TEMPLATES.items():
        tokenizer, said = tokenizer_of(template), _Warnings()
        cells = []
        for case in CASES.values():
            written = ChatFormat(tokenizer)
            with said:
                why = outcome(written, case)
            cells.append("yes" if why is None else f"({notes.setdefault(why, len(notes) + 1)})")
        end = ChatFormat(tokenizer).end_token
        cells.append("none" if end is None else _code(tokenizer.convert_ids_to_tokens(end)))
        lines.append(f"| {name} | {' | '.join(cells)} | {said.cure} |")
    return "\n".join([*lines, "", *(f"{number}. {why}" for why, number in notes.items())])


def _code(token: str) -> str:
    """A token as code; readers of Markdown disagree on how a bar is escaped between backticks."""
    return f"<code>{html.escape(token).replace('|', '&#124;')}</code>"


class _Warnings(logging.Handler):
    """Notes what is said of a difference between training and generation."""

    cure = "alike"

    def __enter__(self) -> None:
        logging.getLogger("holdfast").addHandler(self)

    def __exit__(self, *_: object) -> None:
        logging.getLogger("holdfast").removeHandler(self)

    def emit(self, record: logging.LogRecord) -> None:
        message = record.getMessage()
        if "asked otherwise" in message and self.cure == "alike":
            found = re.search(r"--chat_template_kwargs '(.*?)'", message)
            self.cure = f"`{found[1]}`" if found else "none"


TABLES = {"templates": table}


def main() -> None:
    """Write the table into the document."""
    for name, make in TABLES.items():
        fill_block(name, make(), ROOT / "docs" / "chat_templates.md")


if __name__ == "__main__":
    main()
