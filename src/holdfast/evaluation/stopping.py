"""Which tokens end an answer, and whether those that are trained to are among them."""

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from holdfast.data.rendering import ChatFormat
from holdfast.errors import InputError
from holdfast.models import base_model


def stop_tokens(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Return the tokens that end an answer: the model's (chat models often have several) and the tokenizer's."""
    configured = base_model(model).generation_config.eos_token_id
    own = configured if isinstance(configured, list) else [configured]
    return sorted({token for token in (*own, tokenizer.eos_token_id) if token is not None})


def use_eos_token(tokenizer: PreTrainedTokenizerBase, token: str) -> None:
    """Make another token the tokenizer's end-of-sequence token, as TRL's `eos_token` does.

    Raises:
        InputError: The tokenizer has no such token.
    """
    if token not in tokenizer.get_vocab():
        raise InputError(f"--eos_token {token} is not in the vocabulary; expected one token of it, such as <|im_end|>")
    tokenizer.eos_token = token


def unseen_end(model: PreTrainedModel, written: ChatFormat) -> str | None:
    """Tell whether generation fails to notice the end of answers as they are written in training.

    Args:
        model: The model, whose generation settings name stop tokens.
        written: How conversations are written.

    Returns:
        What to know and which flag cures it, in a sentence; None if generation stops at the end of an answer.
    """
    tokenizer, end = written.tokenizer, written.end_token
    stop = stop_tokens(model, tokenizer)
    if end in stop:
        return None
    known = ", ".join(map(repr, tokenizer.convert_ids_to_tokens(stop))) or "none"
    if end is None:
        where = "the chat template" if written.plain is None else "the tokenizer"
        return (
            f"{where} has no token that ends an answer, so a model that was trained on it may run on "
            f"(stop tokens: {known}); --eos_token names a token to stop at"
        )
    closing = tokenizer.convert_ids_to_tokens(end)
    return (
        f"an answer ends with {closing!r}, which is no stop token (stop tokens: {known}), so the model runs on behind "
        f"it; --eos_token '{closing}' makes it one"
    )
