"""The chat template that `--chat_template_path` names."""

from __future__ import annotations

from pathlib import Path

from transformers import PreTrainedTokenizerBase

from holdfast.errors import InputError
from holdfast.hub import reason
from holdfast.models import load_tokenizer


def is_template_file(path: str) -> bool:
    """Whether a `--chat_template_path` is a template itself, not a tokenizer that has one."""
    return Path(path).suffix in (".jinja", ".j2")


def adopt_chat_template(tokenizer: PreTrainedTokenizerBase, path: str | None) -> None:
    """Give a tokenizer the template of `--chat_template_path`, for what is read before there is a trainer.

    Args:
        tokenizer: The tokenizer, which is changed.
        path: A `.jinja` file, or the folder or Hub id of a tokenizer; None: nothing is done.

    Raises:
        InputError: It cannot be read, or has no template.
    """
    if path is None:
        return
    try:
        if is_template_file(path):
            tokenizer.chat_template = Path(path).read_text(encoding="utf-8")
        else:
            tokenizer.chat_template = load_tokenizer(path).get_chat_template()
    except (OSError, ValueError) as error:
        raise InputError(f"--chat_template_path {path} gives no chat template ({reason(error)})") from error
