"""Two gloo processes that train and shard tiny models; started by test_two_ranks.py.

Usage: two_ranks.py FOLDER. Both ranks are forked off this process, so that the libraries are imported once. Each
writes FOLDER/rank{0,1}.safetensors (keys "case/parameter") and FOLDER/rank{0,1}.json.
"""

import json
import os
import signal
from contextlib import nullcontext
from pathlib import Path

os.environ.update(OMP_NUM_THREADS="1", HF_HUB_OFFLINE="1", TQDM_DISABLE="1")

import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor

from helpers import (
    Gradients,
    golden_batch,
    golden_model,
    golden_rows,
    golden_vector,
    gradients,
    run_to_resume,
    same_bits,
    tiny_llama,
    weights,
    word_rows,
    word_tokenizer,
)
from holdfast.alignment.patcher import PatcherTrainer
from holdfast.alignment.patcher_config import PatcherConfig
from holdfast.checkpoint import load_state, save_state
from holdfast.config import DefenseConfig
from holdfast.errors import InputError, Stopped
from holdfast.evaluation.judges import Cache, JudgeSettings, Verdict
from holdfast.evaluation.judges.asking import AskedJudge
from holdfast.evaluation.judges.cache import Reply
from holdfast.interruption import on_sigterm
from holdfast.parameters import (
    ParameterVector,
    displaced,
    displacement,
    dot,
    local,
    norm,
    restore,
    shard_like,
    share_moved,
    shift,
    snapshot,
    snapshot_on_host,
    take_gradient,
    trainable_parameters,
)
from holdfast.trainer import DefenseTrainer
from methods import METHODS, first_update, mixtral, noted_windows
from ranks import fork_two

BATCH = golden_batch("safe")


class Notes:
    """What a rank has found: tensors by case, and values."""

    def __init__(self, folder, rank):
        self.folder, self.rank = folder, rank
        self.tensors, self.values = {}, {}

    def vector(self, case, vector):
        for name, tensor in vector.items():
            name = name.removeprefix("module.")
            self.tensors[f"{case}/{name}"] = (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).clone()

    def write(self):
        save_file(self.tensors, self.folder / f"rank{self.rank}.safetensors")
        (self.folder / f"rank{self.rank}.json").write_text(json.dumps(self.values))


def settings(folder, **changes):
    return {
        "output_dir": str(folder),
        "report_to": "none",
        "disable_tqdm": True,
        "logging_steps": 1,
        "save_strategy": "no",
        "per_device_train_batch_size": 2,
        "max_grad_norm": 0.0,
        "max_steps": 1,
        "learning_rate": 1e-30,
        "seed": 3,
        **changes,
    }


# ---------------------------------------------------------------------- through the trainer, under DDP


def golden_gradients(notes):
    """The golden batch shared by the ranks, at accumulation 1 and 2, with and without checkpointing."""
    for method in ("sft", "patcher"):
        for accumulation in (1, 2):
            for checkpointing in (False, True):
                noted = Gradients()
                changes = {
                    "per_device_train_batch_size": 2 // accumulation,
                    "gradient_accumulation_steps": accumulation,
                    "gradient_checkpointing": checkpointing,
                }
                common = {"processing_class": word_tokenizer(), "callbacks": [noted]}
                arguments = settings(notes.folder, **changes)
                if method == "sft":
                    trainer = DefenseTrainer(golden_model(), DefenseConfig(**arguments), golden_rows("safe"), **common)
                else:
                    trainer = PatcherTrainer(
                        golden_model(), PatcherConfig(**arguments), golden_rows("safe"), word_rows(8), **common
                    )
                    trainer.attack_vector = golden_vector("attack_vector")
                trainer.train()
                notes.vector(f"{method} {accumulation} {checkpointing}", noted.seen[0])
                notes.values[f"{method} {accumulation} {checkpointing} loss"] = trainer.state.log_history[0]["loss"]
        # A direct call, with unlike numbers of tokens on the two ranks.
        own = {key: t[:1] if notes.rank == 0 else t[1:] for key, t in BATCH.items()}
        trainer.training_step(trainer.model_wrapped, own)
        notes.vector(f"{method} direct", gradients(trainer.model))
        notes.values["world"] = trainer.args.world_size


def every_method(notes):
    """The first update of each method, with what it was made of, and the weights after three."""
    for name, method in METHODS.items():
        for accumulation in (1, 2):
            changes = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": accumulation}
            update = first_update(method, tiny_llama(), settings(notes.folder), **changes)
            case = f"{name} {accumulation}"
            notes.vector(case, update.gradient)
            for role, batches in (("window", update.window), ("second", update.second)):
                for index, batch in enumerate(batches):
                    notes.vector(f"{case} {role} {index}", batch)
        changes = {"max_steps": 3, "learning_rate": 1e-2, "max_grad_norm": 1.0, "lr_scheduler_type": "constant"}
        trainer = method.build(tiny_llama(), {**settings(notes.folder), **changes})
        trainer.train()
        notes.vector(f"{name} updates", weights(trainer.model))


def experts(notes):
    """A Mixture-of-Experts model: the first update of plain training and of Patcher, and the window of this rank."""
    for accumulation in (1, 2):
        changes = {"per_device_train_batch_size": 4 // accumulation, "gradient_accumulation_steps": accumulation}
        arguments, common = settings(notes.folder, **changes), {"processing_class": word_tokenizer()}
        for name, trainer in {
            "sft": DefenseTrainer(mixtral(), DefenseConfig(**arguments), word_rows(8), **common),
            "patcher": PatcherTrainer(mixtral(), PatcherConfig(**arguments), word_rows(8), **common),
        }.items():
            case, noted = f"experts {name} {accumulation}", Gradients()
            trainer.add_callback(noted)
            if name == "patcher":
                trainer.attack_vector = {key: torch.full_like(p, 0.01) for key, p in trainer.model.named_parameters()}
            windows = noted_windows(trainer)
            trainer.train()
            notes.vector(case, noted.seen[0])
            for index, batch in enumerate(windows[0]):
                notes.vector(f"{case} window {index}", batch)


def patcher_updates(notes):
    """Updates with attacks between them, from which the ranks must come out alike."""
    run = notes.folder / "updates"
    trainer = run_to_resume("patcher", str(run), max_steps=5, per_device_train_batch_size=2, save_steps=4)
    trainer.train()
    notes.vector("updates", weights(trainer.model))
    notes.vector("updates attack vector", trainer.attack_vector)
    resumed = run_to_resume("patcher", str(run), max_steps=5, per_device_train_batch_size=2, save_strategy="no")
    resumed.train(resume_from_checkpoint=True)
    notes.values["resumed alike"] = same_bits(weights(resumed.model), weights(trainer.model))
    notes.values["resumed from"] = sorted(p.name for p in run.iterdir() if p.name.startswith("checkpoint"))

    arguments = settings(run, max_steps=3, learning_rate=1e-2, optim="sgd", max_grad_norm=1.0)
    trainer = PatcherTrainer(
        tiny_llama(),
        PatcherConfig(**arguments, attack_every=1, attack_steps=3, attack_learning_rate=1e-3),
        word_rows(16),
        word_rows(12, seed=1),
        processing_class=word_tokenizer(),
    )
    trainer.train()
    notes.vector("shared", weights(trainer.model))
    notes.vector("shared attack vector", trainer.attack_vector)
    notes.values["shared logs"] = [
        [entry[key] for key in ("safe_loss", "attacked_loss", "attacker_first_loss", "attack_vector_norm")]
        for entry in trainer.state.log_history
        if "attack_vector_norm" in entry
    ]


def stopped_run(notes):
    """SIGTERM reaches one rank: the first in its second update, then the other in the attack before its fourth."""

    def trainer_asked_in(update, rank):
        trainer = run_to_resume("patcher", str(run), max_steps=5, per_device_train_batch_size=2, save_strategy="no")
        backward = trainer.backward

        def asked(*arguments, **how):
            if trainer.state.global_step + 1 == update and notes.rank == rank:
                signal.raise_signal(signal.SIGTERM)
            return backward(*arguments, **how)

        trainer.backward = asked
        return trainer

    run, stops = notes.folder / "stopped", notes.values.setdefault("stopped", [])
    for update, rank, resume in ((2, 0, None), (4, 1, True)):
        trainer = trainer_asked_in(update, rank)
        try:
            with on_sigterm(trainer.ask_to_stop):
                trainer.train(resume_from_checkpoint=resume)
        except Stopped as stopped:
            stops.append(Path(stopped.checkpoint).name)
    trainer = trainer_asked_in(None, None)
    trainer.train(resume_from_checkpoint=True)
    notes.vector("stopped", weights(trainer.model))


def discarded_attack(notes):
    """Only rank 1's attack data turn non-finite; both ranks must discard the attack."""
    trainer = PatcherTrainer(
        tiny_llama(),
        PatcherConfig(**settings(notes.folder), attack_every=1, attack_steps=3, attack_learning_rate=1e-3),
        word_rows(8),
        word_rows(8),
        processing_class=word_tokenizer(),
    )
    trainer.train()
    backward = trainer.backward

    def broken(*window, **how):
        loss = backward(*window, **how)
        return loss * torch.nan if notes.rank == 1 else loss

    trainer.backward = broken
    before = weights(trainer.model)
    trainer.attack(trainer.model_wrapped)
    notes.values["discarded"] = trainer.attack_vector is None and same_bits(before, weights(trainer.model))


def refusals(notes):
    try:
        arguments = DefenseConfig(**settings(notes.folder), fsdp=True)
        DefenseTrainer(tiny_llama(), arguments, word_rows(4), processing_class=word_tokenizer())
    except InputError as error:
        notes.values["fsdp refused"] = str(error)
    try:
        arguments = DefenseConfig(**settings(notes.folder), average_tokens_across_devices=False)
        DefenseTrainer(tiny_llama(), arguments, word_rows(4), processing_class=word_tokenizer())
    except InputError as error:
        notes.values["average_tokens refused"] = str(error)


# ---------------------------------------------------------------------- DTensor shards


def mean_loss(model, no_grad=False):
    with torch.no_grad() if no_grad else nullcontext():
        logits = model(input_ids=BATCH["input_ids"], attention_mask=BATCH["attention_mask"], use_cache=False).logits
    return torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), BATCH["labels"][:, 1:].flatten())


def sharded_model(mesh):
    model = golden_model()
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def shards(model):
    return {name: local(p).clone() for name, p in model.named_parameters()}


def on_mesh(notes, case, mesh):
    """Everything that `parameters` does, on shards, next to the same on whole tensors."""
    values = notes.values.setdefault(case, {})
    whole, model = golden_model(), sharded_model(mesh)
    delta = golden_vector("attack_vector")
    shared = ParameterVector({n: shard_like(p, delta[n]) for n, p in trainable_parameters(model).items()})
    values["placements"] = sorted({str(p.placements) for p in model.parameters()})
    values["norms"] = norm(snapshot(model)), norm(snapshot(whole))
    values["dots"] = dot(snapshot(model), shared), dot(snapshot(whole), delta)

    # A no_grad forward pass makes the root keep the gathered weights, which displacing must not leave stale.
    before = shards(model)
    first = mean_loss(model, no_grad=True).item()
    with displaced(model, shared, scale=-3.0):
        inside = mean_loss(model, no_grad=True).item()
        with displaced(model, shared, scale=5.0):
            nested = mean_loss(model, no_grad=True).item()
    after = mean_loss(model, no_grad=True).item()
    with displaced(whole, delta, scale=-3.0):
        whole_inside = mean_loss(whole, no_grad=True).item()
        with displaced(whole, delta, scale=5.0):
            whole_nested = mean_loss(whole, no_grad=True).item()
    values["losses"] = [first, inside, nested, after]
    values["whole losses"] = [mean_loss(whole, no_grad=True).item(), whole_inside, whole_nested, first]
    try:
        with displaced(model, shared):
            raise ZeroDivisionError
    except ZeroDivisionError:
        values["restored"] = same_bits(shards(model), before)

    # Patcher's gradient, α = 0.5.
    with displaced(model, shared):
        mean_loss(model).backward()
        attacked = take_gradient(model)
    mean_loss(model).backward()
    gradient = take_gradient(model)
    values["taken"] = all(p.grad is None for p in model.parameters())
    notes.vector(f"{case} sft", gradient)
    gradient *= 0.5
    gradient += 0.5 * attacked
    notes.vector(f"{case} patcher", gradient)

    # Moving away and back.
    origin = snapshot(model)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            local(parameter).add_(local(shared[name]))
    moved = displacement(model, origin)
    values["returned"] = same_bits(shards(model), before)
    notes.vector(f"{case} displacement", moved)
    mean_loss(model, no_grad=True)
    restore(model, {name: shared[name] for name in shared})
    model_of_delta = golden_model()
    restore(model_of_delta, delta)
    values["restore"] = mean_loss(model, no_grad=True).item(), mean_loss(model_of_delta, no_grad=True).item()

    # What share of the entries has moved, from a copy of this rank's share on the host, and from one as it lies.
    kept, as_it_lies = snapshot_on_host(model), snapshot(model)
    up = {name: tensor.clamp(min=0) for name, tensor in delta.items()}
    shift(model, {name: shard_like(p, up[name]) for name, p in trainable_parameters(model).items()})
    before = snapshot(model_of_delta)
    shift(model_of_delta, up)
    values["moved"] = [
        share_moved(trainable_parameters(model), kept),
        share_moved(trainable_parameters(model), as_it_lies),
        share_moved(trainable_parameters(model_of_delta), before),
    ]

    # The method's state in a checkpoint.
    folder = notes.folder / case.replace(" ", "-")
    folder.mkdir(exist_ok=True)
    dist.barrier()
    save_state(folder, {"attack_vector": shared}, method="Ours", digests={}, write=notes.rank == 0)
    dist.barrier()
    loaded = load_state(folder, trainable_parameters(model), method="Ours")["attack_vector"]
    values["state"] = all(torch.equal(local(loaded[n]), local(shared[n])) for n in shared) and all(
        loaded[n].placements == p.placements for n, p in model.named_parameters()
    )


def placements(notes):
    """Norms over every way of laying a tensor on two ranks."""
    torch.manual_seed(0)
    tensor = torch.randn(7, 5)
    found = []
    for shape in ((2, 1), (1, 2)):
        mesh = init_device_mesh("cpu", shape)
        for layout in (
            [Shard(0), Shard(1)],
            [Shard(0), Replicate()],
            [Replicate(), Shard(0)],
            [Replicate(), Replicate()],
        ):
            vector = {"shared": distribute_tensor(tensor, mesh, layout), "plain": tensor}
            found.append((norm(vector), dot(vector, vector)))
    notes.values["layouts"] = found
    notes.values["layouts expected"] = (
        norm({"a": tensor, "b": tensor}),
        dot({"a": tensor, "b": tensor}, {"a": tensor, "b": tensor}),
    )
    partial = DTensor.from_local(tensor, init_device_mesh("cpu", (2,)), [Partial()])
    try:
        norm({"partial": partial})
    except ValueError as error:
        notes.values["partial"] = str(error)


class RankJudge(AskedJudge):
    """Says which rank was asked."""

    description, tells_refusals = "a rank", True

    def check(self):
        """It can be asked."""

    def key(self, prompt, answer):
        return answer

    def ask(self, questions):
        yield from ((key, Reply(str(dist.get_rank() + 1))) for key in questions)

    def read(self, said):
        return Verdict(int(said), said=said)


def judged(notes):
    judge = RankJudge(JudgeSettings("rubric"), Cache())
    verdicts = judge.verdicts(["p"] * 3, ["a", "b", "a"], [None] * 3)
    notes.values["judged"] = [[verdict.grade for verdict in verdicts], judge.usage["asked_now"]]


def work(folder, rank):
    notes = Notes(folder, rank)
    golden_gradients(notes)
    every_method(notes)
    experts(notes)
    patcher_updates(notes)
    stopped_run(notes)
    discarded_attack(notes)
    refusals(notes)
    on_mesh(notes, "fsdp", init_device_mesh("cpu", (2,)))
    for shape in ((1, 2), (2, 1)):
        on_mesh(notes, f"hsdp {shape[0]}x{shape[1]}", init_device_mesh("cpu", shape, mesh_dim_names=("copy", "shard")))
    placements(notes)
    judged(notes)
    notes.write()
    dist.destroy_process_group()


if __name__ == "__main__":
    fork_two(work)
