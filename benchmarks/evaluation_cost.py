"""What an evaluation costs beside a plain loop around `generate`: 250 prompts, 256 tokens each, on SmolLM2-135M.

One process, as many threads as OMP_NUM_THREADS says. The evaluation renders, batches, generates, decodes, judges by the
keyword judge and scores, as `holdfast evaluate` does once the model is loaded; the loop renders, generates and decodes
the same prompts in their order, in batches of the same size. Both are greedy. They take turns, and the one that begins
changes from pair to pair.

    python benchmarks/evaluation_cost.py                                   # about an hour of a quiet core
    python benchmarks/evaluation_cost.py --prompts 32 --tokens 32 --pairs 2    # minutes; says so in its record

A pair that was measured stays in benchmarks/out/ and is not measured again, unless --fresh is given. Writes
benchmarks/results/evaluation_cost.json, and its line in docs/real.md.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from rich.console import Console
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from holdfast.evaluation.decoding import Decoding
from holdfast.evaluation.evaluate import Evaluator
from holdfast.evaluation.judges import RefusalJudge
from holdfast.evaluation.prompts import PromptSet
from holdfast.files import append_jsonl, versions, write_json
from holdfast.models import load_model_and_tokenizer
from holdfast.proxy.topics import SHIPPED, load_topic
from readme import fill_block
from smollm2 import MODEL, ROOT, install

RESULTS = ROOT / "benchmarks" / "results" / "evaluation_cost.json"
OUT = ROOT / "benchmarks" / "out" / "evaluation_cost"


def questions(count: int) -> list[str]:
    """So many questions, of all kinds that topics have."""
    topics = [load_topic(name, flag="--topic", parts=1, benign_parts=1) for name in SHIPPED]
    sets = [kind for topic in topics for kind in (topic.harmful, topic.benign)]
    turns = max(len(kind.subjects) for kind in sets)
    found = [
        kind.about(kind.subjects[turn])[turn % len(kind.forms)]
        for turn in range(turns)
        for kind in sets
        if turn < len(kind.subjects)
    ]
    if count > len(found):
        raise SystemExit(f"--prompts: there are {len(found)} questions")
    return found[:count]


def plain_loop(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompts: list[str], tokens: int, batch_size: int
) -> list[str]:
    """What one would write by hand."""
    answers = []
    for start in range(0, len(prompts), batch_size):
        talks = [[{"role": "user", "content": prompt}] for prompt in prompts[start : start + batch_size]]
        batch = tokenizer.apply_chat_template(
            talks, add_generation_prompt=True, padding=True, return_tensors="pt", return_dict=True
        )
        with torch.no_grad():
            output = model.generate(**batch, max_new_tokens=tokens, do_sample=False)
        answers += tokenizer.batch_decode(output[:, batch["input_ids"].shape[1] :], skip_special_tokens=True)
    return answers


def measure(args: argparse.Namespace, path: Path, console: Console) -> list[dict[str, Any]]:
    """The pairs of times, those that are on the disk among them."""
    pairs = [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []
    if len(pairs) >= args.pairs:
        return pairs[: args.pairs]
    model, tokenizer = load_model_and_tokenizer(str(args.model))
    tokenizer.padding_side = "left"
    prompts = questions(args.prompts)
    evaluator = Evaluator(
        sets=[PromptSet("harmful", "questions", list(prompts), None)],
        judge=RefusalJudge(),
        decoding=Decoding(max_new_tokens=args.tokens),
        batch_size=args.batch_size,
    )
    runs = {
        "loop": lambda: plain_loop(model, tokenizer, prompts, args.tokens, args.batch_size),
        "evaluation": lambda: evaluator(model, tokenizer),
    }
    plain_loop(model, tokenizer, prompts[:2], 2, 2)  # what the first call sets up belongs to neither
    path.parent.mkdir(parents=True, exist_ok=True)
    while len(pairs) < args.pairs:
        order = list(runs) if len(pairs) % 2 == 0 else list(runs)[::-1]
        pair: dict[str, Any] = {"order": order, "load": os.getloadavg()[0]}
        for name in order:
            started, worked = time.perf_counter(), time.process_time()
            runs[name]()
            pair[name] = {"seconds": time.perf_counter() - started, "cpu": time.process_time() - worked}
        append_jsonl(path, [pair])
        pairs.append(pair)
        loop, evaluation = (pair[name]["seconds"] for name in ("loop", "evaluation"))
        console.print(f"pair {len(pairs)}: loop {loop:.0f} s, evaluation {evaluation:.0f} s, {evaluation / loop:.3f}")
    return pairs


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help=f"a chat model folder (default: {MODEL.relative_to(ROOT)})")
    parser.add_argument("--prompts", type=int, default=250, help="how many questions")
    parser.add_argument("--tokens", type=int, default=256, help="longest answer")
    parser.add_argument("--batch_size", type=int, default=16, help="questions at a time, in both")
    parser.add_argument("--pairs", type=int, default=2, help="how often each is measured")
    parser.add_argument("--fresh", action="store_true", help="measure everything again")
    args = parser.parse_args()
    args.model = args.model or install()
    console = Console()
    path = OUT / f"{args.model.name}-{args.prompts}x{args.tokens}-by-{args.batch_size}.jsonl"
    if args.fresh:
        path.unlink(missing_ok=True)
    pairs = measure(args, path, console)
    ratios = {of: [pair["evaluation"][of] / pair["loop"][of] for pair in pairs] for of in ("seconds", "cpu")}
    record = {
        "schema": 1,
        "versions": versions(),
        "device": "cpu",
        "threads": torch.get_num_threads(),
        **{name: getattr(args, name) for name in ("prompts", "tokens", "batch_size")},
        "model": args.model.name,
        "pairs": pairs,
        "ratios": ratios,
        "median_ratio": {of: statistics.median(found) for of, found in ratios.items()},
    }
    write_json(RESULTS, record)
    median = record["median_ratio"]
    loads = [pair["load"] for pair in pairs]
    lines = (
        f"{args.prompts} prompts, {args.tokens} tokens at most, {args.batch_size} at a time, {args.model.name}: "
        f"{median['seconds']:.2f} times the loop's time, {median['cpu']:.2f} times its CPU time (medians of "
        f"{len(pairs)} pairs, the machine's load being {min(loads):.1f} to {max(loads):.1f})."
    )
    fill_block("evaluation-cost", lines, ROOT / "docs" / "real.md")
    console.print(lines)
    console.print(f"wrote {RESULTS.relative_to(ROOT)}")


if __name__ == "__main__":
    main()
