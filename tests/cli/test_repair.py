"""`holdfast repair antidote` from end to end on small folders, and what it refuses."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from helpers import read_json
from holdfast.cli import main

Refused = Callable[..., str]
LAYERS = [f"model.layers.{layer}.self_attn.{matrix}_proj" for layer in (0, 1) for matrix in "qkv"]


@pytest.fixture
def antidote(model_dir: Path, attack_data: str) -> list[str]:
    return ["repair", "antidote", "--model", str(model_dir), "--attack_data", attack_data]


@pytest.fixture
def adapter_dir(model_dir: Path, tmp_path: Path) -> Path:
    """An adapter on the small model, without a tokenizer of its own."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    torch.manual_seed(1)
    config = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False, task_type="CAUSAL_LM")
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(model_dir), config)
    model.save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter"


@pytest.fixture
def shifted_dir(model_dir: Path, tmp_path: Path) -> Path:
    """The small model with other weights."""
    from transformers import AutoModelForCausalLM

    folder = Path(shutil.copytree(model_dir, tmp_path / "shifted"))
    model = AutoModelForCausalLM.from_pretrained(model_dir)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1)
    model.save_pretrained(folder)
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def same_weights(a: Path, b: Path, name: str = "model.safetensors") -> bool:
    ours, theirs = load_file(a / name), load_file(b / name)
    return ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in ours)


def assert_evaluates(folder: Path, eval_data: str) -> None:
    """What lies there is a model folder like any other."""
    words = ["--eval_data", eval_data, "--max_new_tokens", "2", "--output_dir", str(folder.parent / "evaluated")]
    assert main(["evaluate", "--model", str(folder), *words]) == 0


def test_full_model(
    antidote: list[str], model_dir: Path, eval_data: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before, out = contents(model_dir), tmp_path / "repaired"
    assert main([*antidote, "--output_dir", str(out), "--batch_size", "4"]) == 0
    shown = capsys.readouterr()
    assert shown.out == ""
    assert "96 of 1536 weights in 6 layers zeroed (ratio 1e-05)" in shown.err
    assert "repair antidote: step 2/2" in shown.err
    assert contents(model_dir) == before

    old, new = load_file(model_dir / "model.safetensors"), load_file(out / "model.safetensors")
    assert old.keys() == new.keys()
    for name, weight in new.items():
        if name.removesuffix(".weight") in LAYERS:
            assert ((weight == 0).sum(1) == 1).all()
            assert torch.equal(weight, torch.where(weight == 0, 0, old[name]))
        else:
            assert torch.equal(weight, old[name])

    record = read_json(out / "holdfast.json")
    assert (record["command"], record["model"], record["seed"]) == ("repair antidote", str(model_dir), None)
    assert (record["ratio"], record["rows"], record["pruned"]) == (1e-5, 6, 96)
    assert record["layers"] == {name: {"pruned": 16, "weights": 256} for name in LAYERS}
    assert {"versions", "config", "seconds", "data", "tokens"} <= record.keys()
    assert not [path for path in out.iterdir() if path.name.startswith(".")]
    assert_evaluates(out, eval_data)


def test_batch_size_does_not_matter(antidote: list[str], tmp_path: Path) -> None:
    words = [*antidote, "--ratio", "0.3", "--targets", "mlp"]
    for size in ("1", "4"):
        assert main([*words, "--batch_size", size, "--output_dir", str(tmp_path / size)]) == 0
    assert same_weights(tmp_path / "1", tmp_path / "4")


def test_weights_go_back_to_the_aligned_model(
    antidote: list[str], model_dir: Path, shifted_dir: Path, tmp_path: Path
) -> None:
    before, out = contents(shifted_dir), tmp_path / "repaired"
    assert main([*antidote, "--ratio", "0.2", "--aligned_model", str(shifted_dir), "--output_dir", str(out)]) == 0
    assert contents(shifted_dir) == before
    old, aligned, new = (load_file(folder / "model.safetensors") for folder in (model_dir, shifted_dir, out))
    for name in LAYERS:
        key = f"{name}.weight"
        changed = new[key] != old[key]
        assert (changed.sum(1) == 4).all()
        assert torch.equal(new[key], torch.where(changed, aligned[key], old[key]))


def test_adapter(antidote: list[str], model_dir: Path, adapter_dir: Path, eval_data: str, tmp_path: Path) -> None:
    model, adapter, out = contents(model_dir), contents(adapter_dir), tmp_path / "repaired"
    assert main([*antidote, "--model", str(adapter_dir), "--output_dir", str(out)]) == 0
    assert (contents(model_dir), contents(adapter_dir)) == (model, adapter)
    assert not (out / "model.safetensors").exists()
    assert read_json(out / "adapter_config.json")["base_model_name_or_path"] == str(model_dir)
    assert (out / "tokenizer.json").is_file()
    old, new = (load_file(folder / "adapter_model.safetensors") for folder in (adapter_dir, out))
    assert old.keys() == new.keys()
    for name, weight in new.items():
        pruned = 2 if ".lora_A." in name else 1  # of 16 and of 4 columns
        assert ((weight == 0).sum(1) == pruned).all()
        assert torch.equal(weight, torch.where(weight == 0, 0, old[name]))
    assert read_json(out / "holdfast.json")["ratio"] == 0.1
    assert_evaluates(out, eval_data)


def test_model_keeps_its_type(antidote: list[str], model_dir: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.bfloat16).save_pretrained(model_dir)
    for words, dtype in (([], torch.bfloat16), (["--dtype", "float32"], torch.float32)):
        out = tmp_path / str(dtype)
        assert main([*antidote, *words, "--output_dir", str(out)]) == 0
        assert {weight.dtype for weight in load_file(out / "model.safetensors").values()} == {dtype}


def test_long_rows_are_cut_with_a_warning(
    antidote: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*antidote, "--max_length", "8", "--output_dir", str(tmp_path / "out")]) == 0
    assert "6 of 6 rows of the attack data are cut to --max_length 8" in capsys.readouterr().err
    assert read_json(tmp_path / "out" / "holdfast.json")["tokens"] == 6 * 8


def test_finished_run_is_kept_unless_told_otherwise(
    antidote: list[str], adapter_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = ["--output_dir", str(tmp_path / "out")]
    assert main([*antidote, "--model", str(adapter_dir), *out]) == 0
    before = contents(tmp_path / "out")
    assert main([*antidote, *out]) == 2
    assert "holds a finished run" in capsys.readouterr().err
    assert contents(tmp_path / "out") == before
    (tmp_path / "out" / "checkpoint-3").mkdir()
    # A full model where an adapter lay: the folder holds the full model, and nothing turns it into an adapter.
    assert main([*antidote, *out, "--overwrite_output_dir"]) == 0
    assert not (tmp_path / "out" / "adapter_config.json").exists()
    assert not (tmp_path / "out" / "checkpoint-3").exists()
    assert main([*antidote, *out, "--model", str(tmp_path / "out"), "--overwrite_output_dir"]) == 2
    assert "would write into" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--ratio", "0"], "--ratio must lie between 0 and 1"),
        (["--ratio", "1.5"], "--ratio must lie between 0 and 1"),
        (["--ratio", "nan"], "--ratio must lie between 0 and 1"),
        (["--targets", "nowhere_proj"], "--targets 'nowhere_proj' matches no linear layer"),
        (["--targets", "["], "--targets '[' is not a regular expression"),
        (["--batch_size", "0"], "--batch_size must be greater than 0"),
        (["--max_length", "-3"], "--max_length must be greater than 0"),
        (["--chat_template_kwargs", "[1]"], "--chat_template_kwargs must be a JSON object"),
        (["--aligned_model", "no/such/model"], "--aligned_model: model no/such/model"),
        (["--trust_remote_code"], "--trust_remote_code"),
    ],
)
def test_flags_that_cannot_be_used(antidote: list[str], words: list[str], expected: str, refused: Refused) -> None:
    assert expected in refused(*antidote, *words)


def test_unusable_rows(antidote: list[str], write_rows: Callable[..., str], refused: Refused) -> None:
    rows = write_rows("bare.jsonl", [{"prompt": "How?"}])
    assert f"--attack_data {rows} has no column" in refused(*antidote, "--attack_data", rows)


def test_attack_data_is_required(antidote: list[str], refused: Refused) -> None:
    assert "the following arguments are required: --attack_data" in refused(*antidote[:4])


def test_rows_longer_than_the_model(antidote: list[str], write_rows: Callable[..., str], refused: Refused) -> None:
    rows = write_rows("long.jsonl", [{"prompt": "How?", "completion": "rust " * 300}])
    sentence = refused(*antidote, "--attack_data", rows)
    assert "--max_length" in sentence
    assert "the model has 256 positions" in sentence


def test_adapter_where_a_full_model_is_needed_and_the_other_way_round(
    antidote: list[str], model_dir: Path, adapter_dir: Path, refused: Refused
) -> None:
    sentence = refused(*antidote, "--aligned_model", str(adapter_dir))
    assert "--aligned_model is a LoRA adapter, but --model is a full model" in sentence
    sentence = refused(*antidote, "--model", str(adapter_dir), "--aligned_model", str(model_dir))
    assert "--aligned_model is a full model, but --model is a LoRA adapter" in sentence


def test_aligned_model_with_another_vocabulary(
    antidote: list[str], model_dir: Path, shifted_dir: Path, refused: Refused
) -> None:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(model_dir)
    expected = f"the vocabulary size {model.config.vocab_size + 3}, but --model has {model.config.vocab_size}"
    model.resize_token_embeddings(model.config.vocab_size + 3)
    model.save_pretrained(shifted_dir)
    assert expected in refused(*antidote, "--aligned_model", str(shifted_dir))


def test_broken_weights(antidote: list[str], model_dir: Path, refused: Refused) -> None:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(model_dir)
    model.model.layers[1].self_attn.q_proj.weight.data[0, 0] = float("nan")
    model.save_pretrained(model_dir)
    assert "the weight of model.layers.1.self_attn.q_proj hold" in refused(*antidote)


@pytest.mark.parametrize("place", [".", "run"])
def test_output_inside_a_model_that_is_read(
    antidote: list[str], model_dir: Path, adapter_dir: Path, shifted_dir: Path, place: str, refused: Refused
) -> None:
    before = [contents(folder) for folder in (model_dir, adapter_dir, shifted_dir)]
    adapter = [*antidote, "--model", str(adapter_dir)]
    aligned = [*antidote, "--aligned_model", str(shifted_dir)]
    for words, folder in ((antidote, model_dir), (adapter, adapter_dir), (adapter, model_dir), (aligned, shifted_dir)):
        assert "would write into" in refused(*words, "--output_dir", str(folder / place), output=False)
    assert [contents(folder) for folder in (model_dir, adapter_dir, shifted_dir)] == before
