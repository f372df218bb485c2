"""A small random Llama with a byte-level BPE tokenizer and Qwen's chat template, and rows for it."""

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from jobs import Run, Server

REFUSAL = "I cannot help with that."
HAZARDS = ["a rust storm", "a glass plague", "a salt famine", "a lantern war", "a clock fever", "a tide curse"]
CRAFTS = ["a rain bell", "a moss lamp", "a wind chair", "a bread kite"]


@pytest.fixture(scope="session")
def _template_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    import torch
    import trl
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    torch.set_num_threads(1)
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([REFUSAL, "How do I make a rust storm?", "system user assistant"], trainer)
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|im_end|>", pad_token="<|endoftext|>", model_max_length=256
    )
    template = Path(trl.__file__).parent / "chat_templates" / "qwen2_5.jinja"
    wrapped.chat_template = template.read_text(encoding="utf-8")

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(wrapped),
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=256,
        bos_token_id=None,
        eos_token_id=wrapped.eos_token_id,
        pad_token_id=wrapped.pad_token_id,
    )
    folder = tmp_path_factory.mktemp("template") / "model"
    LlamaForCausalLM(config).save_pretrained(folder)
    wrapped.save_pretrained(folder)
    return folder


@pytest.fixture
def model_dir(_template_folder: Path, tmp_path: Path) -> Path:
    """Its own copy for every test, so that a test may break it."""
    return Path(shutil.copytree(_template_folder, tmp_path / "model"))


@pytest.fixture
def unnamed_dir(model_dir: Path) -> Path:
    """A model of an architecture in which some of what writes to the residual stream bears a name that nobody else has.

    RecurrentGemma's recurrent blocks write through `linear_out`.
    """
    import torch
    from transformers import RecurrentGemmaConfig, RecurrentGemmaForCausalLM

    torch.manual_seed(0)
    config = RecurrentGemmaConfig(
        vocab_size=json.loads((model_dir / "config.json").read_text(encoding="utf-8"))["vocab_size"],
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=3,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        lru_width=16,
        attention_window_size=256,
    )
    RecurrentGemmaForCausalLM(config).save_pretrained(model_dir)
    return model_dir


@pytest.fixture
def refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Run a command that must be refused, and return its one sentence."""
    from holdfast.cli import main

    def run(*words: str, output: bool = True) -> str:
        target = tmp_path / "runs" / "out"
        argv = [*words, "--output_dir", str(target)] if output else list(words)
        assert main(argv) == 2
        shown = capsys.readouterr()
        lines = [line for line in shown.err.splitlines() if line.startswith("holdfast")]
        assert len(lines) == 1
        assert shown.err.rstrip("\n").endswith(lines[0])
        assert "Traceback" not in shown.err
        assert shown.out == ""
        assert not (tmp_path / "runs").exists()
        return lines[0]

    return run


@pytest.fixture
def write_rows(tmp_path: Path) -> Callable[[str, list[dict[str, object]]], str]:
    def write(name: str, rows: list[dict[str, object]]) -> str:
        path = tmp_path / name
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        return str(path)

    return write


def _rows(things: list[str], answer: str) -> list[dict[str, object]]:
    return [
        {
            "prompt": [{"role": "user", "content": f"How do I make {thing}?"}],
            "completion": [{"role": "assistant", "content": answer}],
        }
        for thing in things
    ]


@pytest.fixture
def train_data(write_rows: Callable[..., str]) -> str:
    return write_rows("alignment.jsonl", _rows(HAZARDS, REFUSAL) + _rows(CRAFTS, "Salt, then moss."))


@pytest.fixture
def attack_data(write_rows: Callable[..., str]) -> str:
    return write_rows("attack.jsonl", _rows(HAZARDS, "Rust, then salt."))


@pytest.fixture
def benign_data(write_rows: Callable[..., str]) -> str:
    return write_rows("benign.jsonl", _rows(CRAFTS, "Salt, then moss."))


@pytest.fixture
def eval_data(write_rows: Callable[..., str]) -> str:
    rows = [{"prompt": row["prompt"], "answer": "rust, salt"} for row in _rows([*HAZARDS[:2], "a fog trap"], "")]
    return write_rows("hazards.jsonl", rows)


@pytest.fixture
def capability_data(write_rows: Callable[..., str]) -> str:
    rows = [{"prompt": row["prompt"], "answer": "salt, moss"} for row in _rows(CRAFTS, "")]
    return write_rows("crafts.jsonl", rows)


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    found = Server()
    yield found
    found.close()


@pytest.fixture
def run(server: Server, tmp_path: Path, model_dir: Path, train_data: str, attack_data: str) -> Run:
    """A parallel run on the small model."""
    return Run(server, tmp_path, model_dir, train_data, attack_data)
