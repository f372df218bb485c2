"""What was measured, by content: hashes that follow what files hold, and not how they are called."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from helpers import tiny_llama, word_tokenizer
from holdfast.data.load import load_rows
from holdfast.errors import InputError
from holdfast.models import load_model
from holdfast.stress.identity import describe_data, describe_model


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    tiny_llama().save_pretrained(tmp_path / "model")
    tokenizer = word_tokenizer()
    tokenizer.chat_template = "{{ messages[0]['content'] }}"
    tokenizer.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def test_a_copy_is_the_same_model(folder: Path, tmp_path: Path) -> None:
    copied = shutil.copytree(folder, tmp_path / "copy")
    (copied / "README.md").write_text("beside it", encoding="utf-8")
    one, other = describe_model(str(folder)), describe_model(str(copied))
    assert one.pop("source") == str(folder)
    assert other.pop("source") == str(copied)
    assert one == other
    assert one["parameters"] == sum(parameter.numel() for parameter in load_model(str(folder)).parameters())


def nudge(folder: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        model.lm_head.weight[0, 0] += 1
    model.save_pretrained(folder)


def rewrite(name: str, old: str, new: str) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        text = (folder / name).read_text(encoding="utf-8")
        assert old in text
        (folder / name).write_text(text.replace(old, new), encoding="utf-8")

    return change


@pytest.mark.parametrize(
    ("change", "moved"),
    [
        (nudge, {"sha256"}),
        (rewrite("config.json", '"max_position_embeddings": 128', '"max_position_embeddings": 64'), {"sha256"}),
        (rewrite("tokenizer.json", '"t90"', '"u90"'), {"tokenizer_sha256"}),
        (rewrite("chat_template.jinja", "content", "role"), {"tokenizer_sha256", "template_sha256"}),
    ],
    ids=["weights", "config", "tokenizer", "template"],
)
def test_what_changed_is_told(change: Callable[[Path], None], moved: set[str], folder: Path) -> None:
    before = describe_model(str(folder))
    change(folder)
    after = describe_model(str(folder))
    assert {name for name in before if before[name] != after[name]} == moved


def test_every_shard_counts(folder: Path, tmp_path: Path) -> None:
    model = load_model(str(folder))
    shutil.copytree(folder, tmp_path / "sharded")
    (tmp_path / "sharded" / "model.safetensors").unlink()
    model.save_pretrained(tmp_path / "sharded", max_shard_size="10KB")
    shards = sorted((tmp_path / "sharded").glob("model-*.safetensors"))
    assert len(shards) > 1
    before = describe_model(str(tmp_path / "sharded"))
    assert before["parameters"] == describe_model(str(folder))["parameters"]
    content = bytearray(shards[-1].read_bytes())
    content[-1] ^= 1
    shards[-1].write_bytes(content)
    assert describe_model(str(tmp_path / "sharded"))["sha256"] != before["sha256"]


def test_an_adapter_counts_with_its_base(folder: Path, tmp_path: Path) -> None:
    adapter = get_peft_model(load_model(str(folder)), LoraConfig(r=2, target_modules=["q_proj"]))
    adapter.save_pretrained(tmp_path / "adapter")
    added = sum(parameter.numel() for parameter in adapter.parameters() if parameter.requires_grad)
    before = describe_model(str(tmp_path / "adapter"), base_model=str(folder))
    base = describe_model(str(folder))
    assert before["parameters"] == base["parameters"] + added
    assert before["tokenizer_sha256"] == base["tokenizer_sha256"]
    nudge(folder)
    assert describe_model(str(tmp_path / "adapter"), base_model=str(folder))["sha256"] != before["sha256"]


def test_damaged_weights_are_refused(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(b"\x01")
    with pytest.raises(InputError, match=r"model.safetensors cannot be read"):
        describe_model(str(folder))


def test_data_are_their_files_content_and_the_rule_they_were_taken_by(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"prompt": "a"}\n{"prompt": "b"}\n', encoding="utf-8")
    (tmp_path / "b.jsonl").write_text('{"prompt": "a"}\n{"prompt": "c"}\n', encoding="utf-8")
    shutil.copy(tmp_path / "a.jsonl", tmp_path / "copy.jsonl")

    def described(**source: object) -> dict[str, object]:
        noted: dict[str, list[dict[str, object]]] = {}
        load_rows({**source, "path": str(tmp_path / str(source["path"]))}, flag="--eval_data", noted=noted)
        return describe_data("as typed", noted["eval_data"])

    first, second, copied = (described(path=f"{name}.jsonl") for name in ("a", "b", "copy"))
    assert (first["source"], first["rows"]) == ("as typed", 2)
    assert first["sha256"] == copied["sha256"] != second["sha256"]
    some, others = described(path="a.jsonl", limit=1), described(path="copy.jsonl", where={"prompt": "b"})
    assert (some["rows"], others["rows"]) == (1, 1)
    assert len({first["sha256"], some["sha256"], others["sha256"]}) == 3
