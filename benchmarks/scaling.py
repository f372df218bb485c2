"""The tables of docs/scaling.md: what `scaling_model.py` computes, beside what was measured in benchmarks/results.

It needs no GPU and takes seconds:

    python benchmarks/scaling.py        # puts them into docs/scaling.md
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from typing import Any

from readme import RESULTS, ROOT, fill_block
from scaling_model import (
    ATTACKING,
    BUS,
    CHECK,
    DEFENDING,
    DEFENSE,
    FULL,
    GPU_MEMORY,
    HASHING,
    LENGTH,
    LORA,
    METHODS,
    MODELS,
    NODE,
    PARALLEL,
    PASSED,
    PEAK,
    RESERVED,
    ROUNDS,
    ROWS,
    SEQUENTIAL,
    SFT,
    STORAGE,
    TO_HOST,
    UTILISATION,
    WEIGHT,
    Model,
    exchange,
    passes,
    speed_up,
    staleness,
)

DOCUMENT = ROOT / "docs" / "scaling.md"
GPUS = (8, 64)
STORAGES = (1e9, 5e9, 20e9)
SLOWER = (BUS, BUS / 3, BUS / 10)
STALE = (
    (500, 1000, 1000),
    (500, 500, 1000),
    (500, 100, 1000),
    (500, 500, 500),
    (500, 250, 250),
    (1500, 1000, 1000),
    (3000, 1000, 1000),
)
"""k₁, and updates between publications and between looks, to show the age of attack vectors for."""


def assumptions_table() -> str:
    """What is not counted."""
    arithmetic = f"{PEAK / 1e12:.0f} TFLOP/s in bf16 (H100 SXM), of which {percent(UTILISATION)} are reached"
    traffic = f"{gb(BUS)} GB/s of bus bandwidth; the shorter of traffic and arithmetic hides under the longer"
    storage = f"GPU to host {gb(TO_HOST)} GB/s each; storage {gb(STORAGE)} GB/s; SHA-256 {gb(HASHING)} GB/s"
    patcher = f"{ROUNDS} rounds of k₂ = {DEFENSE}; k₁ = {SEQUENTIAL} sequential, {PARALLEL} parallel (the paper's)"
    rows = [
        ("GPU", f"{gb(GPU_MEMORY)} GB, of which {gb(RESERVED)} are left to CUDA, NCCL and fragmentation"),
        ("pass", f"{ROWS} rows of {LENGTH} tokens on every GPU, in both roles; no accumulation"),
        ("arithmetic", arithmetic),
        ("between GPUs", traffic),
        ("node", f"{NODE} GPUs"),
        ("exchange", storage),
        ("Patcher", patcher),
    ]
    return table(("assumed", "value"), rows)


def parameter_table() -> str:
    """Bytes a trained parameter, and work, of every method."""
    rows = []
    for name, buffers, work in METHODS:
        state, (kept, ratio) = SFT + WEIGHT * buffers, measured(name)
        rows.append((name, state, buffers, number(kept), f"{work / FULL:.2f}", number(ratio)))
    heads = ("bytes", "buffers", "buffers, *measured*", "update", "update, *measured*")
    return table(("method", *heads), rows)


def gpu_table() -> str:
    """What every GPU holds."""
    states = (SFT, DEFENDING, ATTACKING, LORA)

    def cell(model: Model, gpus: int, state: int) -> str:
        used = model.per_gpu(gpus, state)
        return f"{gb(used)}, {gb(GPU_MEMORY - used)} left" if used <= GPU_MEMORY else f"**{gb(used)}**"

    rows = []
    for model in MODELS:
        for gpus in GPUS:
            rows.append((f"{model.name} on {gpus}", *(cell(model, gpus, state) for state in states)))
        rows.append((f"{model.name} fits on", *(model.least(state) for state in states)))
    heads = ("SFT, attacker's job", "defender, Booster, Antibody", "sequential Patcher", "LoRA attacker's job")
    return table(("GB on a GPU", *(f"{head}: {state} B" for head, state in zip(heads, states, strict=True))), rows)


def parts_table() -> str:
    """What is not shared out."""
    rows = []
    for model in MODELS:
        sizes = (model.gathered(), model.activations(), RESERVED, PASSED * model.parameters)
        rows.append((model.name, f"{model.parameters:,}", *map(gb, sizes)))
    return table(("GB on every GPU", "parameters", "gathered", "activations", "reserved", "if accumulating"), rows)


def check_table() -> str:
    """Peaks to hold against a measurement on one GPU."""
    peaks = (gb(CHECK.per_gpu(1, state) - RESERVED) for state in (SFT, DEFENDING, ATTACKING))
    return table(("GB on one GPU", "SFT", "Patcher, defending", "Patcher, attacking"), [(CHECK.name, *peaks)])


def host_table() -> str:
    """What a node holds in main memory, and a checkpoint on disk."""
    rows = []
    for model in MODELS:
        nodes = math.ceil(model.least(DEFENDING) / NODE)
        on_disk = 5 * model.version  # the weights twice, as safetensors and for FSDP; two moments; δ
        sizes = (NODE * model.version, model.version, 3 * model.version / nodes, on_disk)
        rows.append((model.name, nodes, *(gb(size) for size in sizes), seconds(on_disk / STORAGE)))
    copies = ("loading", "δ in a checkpoint, on the first node", "copies for the exchange")
    heads = ("nodes", *copies, "a checkpoint on disk", "written in")
    return table(("GB of a node of the defender's", *heads), rows)


def network_table() -> str:
    """Traffic of a pass."""
    rows = []
    for model in MODELS:
        traffic = [model.traffic(gpus) for gpus in GPUS]
        rows.append((model.name, *map(gb, traffic), seconds(traffic[-1] / BUS), seconds(model.arithmetic())))
    heads = (*(f"GB a GPU and pass, on {gpus}" for gpus in GPUS), f"transfer on {GPUS[-1]}", "arithmetic")
    return table(("model", *heads), rows)


def hiding_line() -> str:
    """From how many tokens on traffic is hidden."""
    tokens = [f"{3 * PASSED * PEAK * UTILISATION / (FULL * rate):,.0f} at {gb(rate)} GB/s" for rate in SLOWER]
    return f"Tokens a GPU and pass: {', '.join(tokens)}."


def exchange_table() -> str:
    """One version, and what the defender waits for."""
    rows = []
    for model in MODELS:
        defender, _ = groups(model)
        times, interval = exchange(model, defender), DEFENSE * 2 * model.seconds(defender)
        written = (seconds(model.version / rate) for rate in STORAGES)
        waited = (times.copying, times.taking)
        share = percent(times.waiting / interval)
        rows.append(
            (model.name, gb(model.version), *written, seconds(interval), *(seconds(time) for time in waited), share)
        )
    rates = (f"moved at {gb(rate)} GB/s" for rate in STORAGES)
    heads = (*rates, f"{DEFENSE} updates", "waits for its copy", "waits for a vector", "together")
    return table(("a version", "GB", *heads), rows)


def speed_up_table() -> str:
    """What the parallel form gains."""
    rows = []
    for steps in (SEQUENTIAL, PARALLEL):
        gain = speed_up(steps)
        round_ = (f"{2 * DEFENSE + steps:,}", f"{2 * DEFENSE:,}")
        rows.append((steps, *round_, f"{gain:.2f}", percent(1 - 1 / gain), percent(steps / (2 * DEFENSE))))
    heads = ("passes a round, sequential", "parallel", "speed-up", "break-even share", "attacker busy")
    return table(("k₁", *heads), rows)


def hours_table() -> str:
    """The published runs."""
    rows: list[Sequence[Any]] = []
    for model in MODELS:
        for gpus in GPUS:
            name, split = f"{model.name} on {gpus}", model.split(gpus)
            alone = model.seconds(gpus) * passes() * speed_up(SEQUENTIAL)
            sequential = hours(alone) if gpus >= model.least(ATTACKING) else "does not fit"
            if split is None:
                rows.append((name, sequential, "–", "does not fit", "–", "–"))
                continue
            defender, attacker = split
            times, own = exchange(model, defender), model.seconds(defender)
            parallel = hours(own * passes() + ROUNDS * times.waiting)
            busy = times.taking + PARALLEL * model.seconds(attacker) + times.appearing
            batches = f"{ROWS * gpus} and {ROWS * defender}"
            round_ = f"{seconds(busy)} of {seconds(2 * DEFENSE * own)}"
            rows.append((name, sequential, f"{defender} + {attacker}", parallel, batches, round_))
    heads = (
        f"sequential, k₁ = {SEQUENTIAL}",
        "defender + attacker",
        f"parallel, k₁ = {PARALLEL}",
        "rows an update",
        "attacker's share of a round",
    )
    return table(("hours", *heads), rows)


def staleness_table() -> str:
    """How old attack vectors are."""
    model = next(model for model in MODELS if model.name == "Llama-3-8B")
    defender, attacker = groups(model)
    update, times = 2 * model.seconds(defender), exchange(model, defender)
    rows = []
    for steps, publish, look in STALE:
        found = staleness(update, steps * model.seconds(attacker), times, publish, look)
        ages = (f"{updates:,}" for updates in (found.first, found.new, found.oldest))
        waits = percent((times.copying / publish + times.taking / look) / update)
        rows.append((f"{steps:,}", f"{publish:,}", f"{look:,}", *ages, percent(found.busy), waits))
    heads = ("first vector at", "age when it comes", "age when it goes", "attacker busy", "defender waits")
    return table(("k₁", "publish every", "look every", *heads), rows)


TABLES: dict[str, Callable[[], str]] = {
    "assumptions": assumptions_table,
    "bytes-per-parameter": parameter_table,
    "not-shared": parts_table,
    "bytes-per-gpu": gpu_table,
    "check": check_table,
    "host-memory": host_table,
    "network": network_table,
    "hiding": hiding_line,
    "exchange": exchange_table,
    "speed-up": speed_up_table,
    "hours": hours_table,
    "staleness": staleness_table,
}


# ---------------------------------------------------------------------- details


def measured(name: str) -> tuple[float | None, float | None]:
    """Buffers beyond SFT, and an update in SFT updates under activation checkpointing; None where not measured."""
    patcher, others = (json.loads((RESULTS / f"{cost}_cost.json").read_text("utf-8")) for cost in ("step", "method"))
    [memory] = [m for m in patcher["memory"] if m["shape"]["name"] == "Llama" and not m["activation_checkpointing"]]
    if name == "Patcher, defending":
        return memory["defending_buffers_beyond_sft"], _ratio(patcher["time"])
    if name == "Patcher, attacking in its sequential form":
        return memory["attacking_buffers_beyond_sft"], None
    if name not in others["methods"]:
        return None, None
    entry = others["methods"][name]
    return entry["memory"]["buffers_beyond_sft"], _ratio(entry["time"])


def _ratio(times: Sequence[dict[str, Any]]) -> float:
    [entry] = [t for t in times if t["shape"]["name"] == "Llama" and t["activation_checkpointing"]]
    return float(entry["ratio"]["median"])


def groups(model: Model) -> tuple[int, int]:
    """The larger number of GPUs, split."""
    split = model.split(GPUS[-1])
    assert split is not None
    return split


def gb(size: float) -> str:
    """Bytes in GB, to about three digits."""
    value = size / 1e9
    return f"{value:,.0f}" if value >= 100 or value == int(value) else f"{value:.1f}"


def seconds(time: float) -> str:
    """Seconds to about three digits."""
    return f"{time:,.0f} s" if time >= 100 else f"{time:.1f} s" if time >= 1 else f"{time:.2f} s"


def hours(time: float) -> str:
    """Seconds as hours."""
    return f"{time / 3600:.1f}"


def percent(share: float) -> str:
    """A share; small ones to a digit more."""
    return f"{100 * share:.1f} %" if share < 0.1 else f"{100 * share:.0f} %"


def number(value: float | None) -> str:
    """A measured number."""
    return "–" if value is None else f"{abs(value):.2f}"


def table(heads: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """A Markdown table."""
    lines = [f"| {' | '.join(map(str, line))} |" for line in (heads, *rows)]
    return "\n".join([lines[0], "|---" * len(heads) + "|", *lines[1:]])


def main() -> None:
    """Refresh the document."""
    for name, make in TABLES.items():
        fill_block(name, make(), DOCUMENT)


if __name__ == "__main__":
    main()
