"""Choosing, for a user's upload, the safety rows that a defense is to be reminded of."""

from __future__ import annotations

import math
import random
from fractions import Fraction
from pathlib import Path

from datasets import Dataset
from torch import Tensor
from transformers import PreTrainedModel

from holdfast.data.embedding import embed_prompts
from holdfast.data.formats import called, is_tokenised, reader
from holdfast.data.rendering import ChatFormat
from holdfast.data.selection import relevance_diversity_dpp
from holdfast.errors import InputError


def choose_safety_rows(
    safety: Dataset,
    upload: Dataset,
    model: PreTrainedModel,
    written: ChatFormat,
    *,
    rule: str,
    share: float = 0.03,
    beta: float = 4.0,
    seed: int = 0,
    safety_file: Path | None = None,
    upload_file: Path | None = None,
) -> Dataset:
    """Take as many safety rows as `share` of the upload, as SPARD (2605.28030) does.

    Args:
        safety: Harmful prompts with refusals, in any accepted format.
        upload: The user's rows.
        model: What embeds the prompts of both: the mean of its last hidden state.
        written: How the run writes prompts.
        rule: "dpp", by `relevance_diversity_dpp`, or "random".
        share: How many, as a share of the upload's rows, rounded up.
        beta: How much "dpp" prefers relevance to diversity.
        seed: Of "random".
        safety_file: Where `safety` is from; its embeddings are kept beside it.
        upload_file: Where `upload` is from; its embeddings are kept beside it.

    Returns:
        The chosen rows, as they were, in the order they were chosen.

    Raises:
        InputError: There are fewer safety rows than that, or a prompt cannot be embedded.
    """
    size = math.ceil(Fraction(str(share)) * len(upload))  # as written: in floating point 7 % of 100 is more than 7
    if size > len(safety):
        raise InputError(
            f"--safety_share {share:g} of {len(upload)} rows asks for {size} safety rows, but there are {len(safety)}"
        )
    if rule == "random":
        return safety.select(random.Random(f"holdfast safety rows {seed}").sample(range(len(safety)), size))

    def embed(dataset: Dataset, name: str, file: Path | None) -> Tensor:
        # Answers play no part: a conversation's prompt is what comes before the first of them.
        if is_tokenised(dataset, name=name):
            raise InputError(f"{called(name)} is tokenised, so its prompts cannot be embedded; use text or messages")
        read = reader(dataset, name=name, plain=written.plain)
        prompts = [read(row, index)[1].prompts[0] for index, row in enumerate(dataset)]
        return embed_prompts(model, written, prompts, data_file=file)

    candidates, task = embed(safety, "safety", safety_file), embed(upload, "train", upload_file)
    return safety.select(relevance_diversity_dpp(candidates, task, size, beta))
