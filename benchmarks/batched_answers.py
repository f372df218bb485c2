"""Whether greedy answers depend on the batch that they are decoded in: alone against eight at a time, by precision.

One process, as many threads as OMP_NUM_THREADS says, on the CPU. Eight questions of different lengths, so that a batch
has padding. An answer differs when its text does; `first` is the token at which it first does.

    python benchmarks/batched_answers.py --model HuggingFaceTB/SmolLM2-135M-Instruct

writes benchmarks/results/batched_answers.json, from which the docstring of `holdfast.evaluation.generation` quotes.
"""

from __future__ import annotations

import argparse
import os
from itertools import zip_longest
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from rich.console import Console

from holdfast.evaluation.decoding import Decoding
from holdfast.evaluation.generation import generate
from holdfast.files import versions, write_json
from holdfast.models import load_model_and_tokenizer

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "batched_answers.json"
TOKENS = 64
QUESTIONS = (
    "Why is the sky blue?",
    "Name three uses of salt.",
    "What is a good way to keep bread fresh for a few days without a freezer?",
    "Explain in a few words how a sailing boat can go against the wind.",
    "My tomato plants have yellow leaves, although I water them every evening. What may be wrong with them?",
    "Tell me a short story about a clock that runs backwards.",
    "How do bees find their way home?",
    "What should I take with me on a walk of two days in the mountains in autumn, if I want to carry little?",
)


def main() -> None:
    """Answer alone and together, in float32 and in bfloat16."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", required=True, help="a chat model, of a folder or of the Hub")
    parser.add_argument("--name", help="what to call it in the record, where that is not --model")
    args = parser.parse_args()
    console = Console()
    found: dict[str, Any] = {}
    decoding = Decoding(do_sample=False, max_new_tokens=TOKENS)
    for dtype in ("float32", "bfloat16"):
        model, tokenizer = load_model_and_tokenizer(args.model, dtype=dtype)
        alone, together = (
            [answer.text for answer in generate(model, tokenizer, QUESTIONS, decoding=decoding, batch_size=size)]
            for size in (1, len(QUESTIONS))
        )
        pairs = zip(alone, together, strict=True)
        first = [_first_difference(tokenizer(a).input_ids, tokenizer(b).input_ids) for a, b in pairs]
        differ = sum(place is not None for place in first)
        found[dtype] = {"differ": differ, "first": first, "alone": alone, "together": together}
        console.print(f"{dtype}: {differ} of {len(QUESTIONS)} answers differ, at token {first}")
    record = {"schema": 1, "versions": versions(), "device": "cpu", "threads": torch.get_num_threads()}
    write_json(
        RESULTS, {**record, "model": args.name or args.model, "max_new_tokens": TOKENS, "n": len(QUESTIONS), **found}
    )
    console.print(f"wrote {RESULTS.relative_to(ROOT)}")


def _first_difference(a: list[int], b: list[int]) -> int | None:
    return next((place for place, pair in enumerate(zip_longest(a, b)) if pair[0] != pair[1]), None)


if __name__ == "__main__":
    main()
