"""Text as token ids, and where in the text each token is from."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase

from holdfast.data.spans import Span
from holdfast.errors import InputError


def token_ids(
    tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], *, plain: bool, offsets: bool = False
) -> list[tuple[list[int], list[Span]]]:
    """Token ids of texts, and where in the text each token is from.

    Args:
        tokenizer: The tokenizer.
        texts: What a chat template has written, or plain text.
        plain: Whether it is the latter, which has no special tokens yet. No end is put behind it.
        offsets: Whether to tell where tokens are from; else nothing is told of it.

    Raises:
        InputError: The tokenizer does not know where its tokens come from.
    """
    if not texts:
        return []
    if offsets and not tokenizer.is_fast:
        raise InputError(
            f"the tokenizer ({type(tokenizer).__name__}) does not tell where its tokens come from; expected one with a "
            "tokenizer.json"
        )
    bos, eos = tokenizer.bos_token, tokenizer.eos_token
    # A template writes its special tokens itself, and so does text that begins with one.
    adds = [plain and not (bos and text.startswith(bos)) for text in texts]
    if any(adds) and not all(adds):
        return [token_ids(tokenizer, [text], plain=plain, offsets=offsets)[0] for text in texts]
    found = tokenizer(list(texts), add_special_tokens=adds[0], return_offsets_mapping=offsets, verbose=False)
    encoded = []
    for text, ids, places in zip(
        texts, found["input_ids"], found["offset_mapping"] if offsets else [[]] * len(texts), strict=True
    ):
        # Some tokenizers end every text; prompts go on, and completions have their end already.
        ended = adds[0] and len(ids) > 1 and ids[-1] == tokenizer.eos_token_id
        if ended and (not text.endswith(eos) or ids[-2] == ids[-1]):
            ids, places = ids[:-1], places[:-1]
        encoded.append((ids, places))
    return encoded


def covered(offsets: Sequence[Span], span: Span) -> Span:
    """The first token of a span of text, and the one after its last."""
    starts, ends = [start for start, _ in offsets], [end for _, end in offsets]
    return bisect_right(ends, span[0]), bisect_left(starts, span[1])
