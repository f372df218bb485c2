"""Models load from folders, adapter folders and the Hub, and never from a pickle."""

import json
import shutil

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file

from helpers import tiny_llama, word_tokenizer
from holdfast import models
from holdfast.errors import InputError
from holdfast.models import load_model, load_model_and_tokenizer, load_tokenizer, require_chat_template
from hub import models_in_cache

IDS = torch.tensor([[4, 5, 6]])


@pytest.fixture
def folder(tmp_path):
    path = tmp_path / "model"
    tiny_llama().save_pretrained(path)
    word_tokenizer().save_pretrained(path)
    return path


@pytest.fixture
def adapter(tmp_path, folder):
    path = tmp_path / "adapter"
    config = LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
    model = get_peft_model(load_model(str(folder)), config)
    model.save_pretrained(path)
    return path


def refused(call, source):
    with pytest.raises(InputError) as caught:
        call(str(source))
    message = str(caught.value)
    assert str(source) in message
    assert "\n" not in message
    return message


def test_a_folder_is_loaded_in_float32(tmp_path, folder):
    tiny_llama().to(torch.bfloat16).save_pretrained(folder)
    model = load_model(str(folder))
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert load_model(str(folder), dtype="bfloat16").dtype == torch.bfloat16
    assert load_tokenizer(str(folder)).eos_token == "t2"


def test_a_model_is_not_spread_over_devices_unless_asked_to(folder, monkeypatch):
    """On a machine with GPUs TRL would do so, and accelerate would then refuse to train on several."""
    asked, load = [], models.create_model_from_path
    monkeypatch.setattr(
        models, "create_model_from_path", lambda *args, **kwargs: asked.append(kwargs) or load(*args, **kwargs)
    )
    load_model(str(folder))
    load_model(str(folder), device_map="cpu")
    assert [kwargs["device_map"] for kwargs in asked] == [None, "cpu"]


@pytest.mark.parametrize("trainable", [False, True])
def test_an_adapter_is_put_on_its_base(folder, adapter, trainable):
    model = load_model(str(adapter), trainable=trainable)
    assert isinstance(model, PeftModel)
    assert any(parameter.requires_grad for parameter in model.parameters()) is trainable
    with torch.no_grad():
        assert not torch.equal(model.eval()(IDS).logits, load_model(str(folder)).eval()(IDS).logits)


def test_an_adapters_own_tokenizer_comes_first(adapter):
    assert load_tokenizer(str(adapter)).eos_token == "t2"
    tokenizer = word_tokenizer()
    tokenizer.eos_token = "t9"
    tokenizer.save_pretrained(adapter)
    assert load_tokenizer(str(adapter)).eos_token == "t9"


def test_model_and_tokenizer_come_together(adapter):
    model, tokenizer = load_model_and_tokenizer(str(adapter), trainable=True)
    assert any(parameter.requires_grad for parameter in model.parameters())
    assert tokenizer.eos_token == "t2"


def test_weights_that_are_not_there_are_not_drawn_at_random(folder):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 3}))
    message = refused(load_model, folder)
    assert "has no weights for 9 of the parameters of a LlamaForCausalLM" in message
    assert "the first being model.layers.2.input_layernorm.weight" in message


def test_adapter_weights_that_are_not_there_are_not_drawn_at_random(folder, adapter):
    tensors = load_file(adapter / "adapter_model.safetensors")
    save_file(dict(list(tensors.items())[1:]), adapter / "adapter_model.safetensors")
    assert "it has none for 1 of the weights, the first being base_model." in refused(load_model, adapter)


@pytest.mark.parametrize("load", [load_model, load_tokenizer])
@pytest.mark.parametrize("source", ["no/such/folder", "./missing", "a b", "/nowhere/model"])
def test_a_path_that_is_neither_a_folder_nor_a_hub_id_is_refused(load, source):
    assert "is neither a folder nor a model on the Hub; no such folder" in refused(load, source)


@pytest.mark.parametrize("load", [load_model, load_tokenizer])
def test_a_hub_id_that_cannot_be_read_is_refused(load):
    message = refused(load, "nobody/no-such-model")
    assert "is neither a folder nor a model on the Hub that can be read (" in message
    assert "offline" in message


def test_a_file_is_refused(folder):
    assert "is a file; expected a model folder" in refused(load_model, folder / "model.safetensors")


def test_a_folder_without_a_config_is_refused(tmp_path):
    assert "has no config.json" in refused(load_model, tmp_path)


def test_a_folder_without_weights_is_refused(folder):
    (folder / "model.safetensors").unlink()
    assert "has no weights" in refused(load_model, folder)


def test_a_pickle_is_refused_unopened(folder):
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(b"not even a pickle")
    assert "holds a pickle (pytorch_model.bin)" in refused(load_model, folder)


def test_an_adapters_pickle_is_refused_unopened(adapter):
    (adapter / "adapter_model.safetensors").unlink()
    (adapter / "adapter_model.bin").write_bytes(b"not even a pickle")
    assert "holds a pickle (adapter_model.bin)" in refused(load_model, adapter)


def test_a_pickle_under_an_adapter_is_refused_unopened(folder, adapter):
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(InputError, match=r"model holds a pickle \(pytorch_model.bin\)"):
        load_model(str(adapter))


def test_a_pickle_beside_safetensors_is_not_read(folder):
    (folder / "pytorch_model.bin").write_bytes(b"not even a pickle")
    assert load_model(str(folder)).dtype == torch.float32


def test_an_adapter_whose_base_is_gone_is_refused(folder, adapter):
    shutil.rmtree(folder)
    with pytest.raises(InputError, match="neither a folder nor a model on the Hub"):
        load_model(str(adapter))


def test_an_adapter_that_does_not_fit_its_base_is_refused(folder, adapter):
    tiny_llama(hidden_size=32).save_pretrained(folder)
    assert "cannot be put on its base model" in refused(load_model, adapter)


def test_an_adapter_of_a_deeper_model_is_refused(folder, adapter):
    """peft would leave out what has no place, without a word."""
    tiny_llama(num_hidden_layers=1).save_pretrained(folder)
    assert "there is no place for 2 of the weights, the first being base_model." in refused(load_model, adapter)


def test_an_adapter_on_another_adapter_is_refused(adapter, tmp_path):
    other = shutil.copytree(adapter, tmp_path / "other")
    config = json.loads((other / "adapter_config.json").read_text())
    config["base_model_name_or_path"] = str(adapter)
    (other / "adapter_config.json").write_text(json.dumps(config))
    assert f"is on another adapter, {adapter}; merge that into its base" in refused(load_model, other)


@pytest.mark.parametrize("config", ["{", "{}", '{"base_model_name_or_path": null}'])
def test_an_adapter_without_a_base_is_refused(adapter, config):
    (adapter / "adapter_config.json").write_text(config)
    assert "names no base model" in refused(load_model, adapter)


def test_an_adapter_on_itself_is_refused(adapter):
    (adapter / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": str(adapter)}))
    assert "names no base model" in refused(load_model, adapter)


def test_broken_weights_are_refused(folder):
    (folder / "model.safetensors").write_bytes(b"garbage")
    assert "cannot be loaded" in refused(load_model, folder)


def test_a_broken_config_is_refused(folder):
    (folder / "config.json").write_text('{"model_type": "no-such-architecture"}')
    assert "cannot be loaded" in refused(load_model, folder)


def test_a_folder_without_a_tokenizer_is_refused(folder):
    (folder / "tokenizer.json").unlink()
    assert "has no tokenizer" in refused(load_tokenizer, folder)


def test_a_broken_tokenizer_is_refused(folder):
    (folder / "tokenizer.json").write_text("{")
    assert "the tokenizer of model" in refused(load_tokenizer, folder)


def test_code_that_comes_with_a_model_is_refused(folder):
    with pytest.raises(InputError, match="--trust_remote_code is not supported"):
        load_model(str(folder), trust_remote_code=True)
    config = json.loads((folder / "config.json").read_text())
    config.update(model_type="homemade", auto_map={"AutoConfig": "c.C", "AutoModelForCausalLM": "m.M"})
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "c.py").write_text("raise SystemExit('code was run')")
    assert "cannot be loaded" in refused(load_model, folder)


def test_a_chat_template_is_required_where_messages_need_it():
    tokenizer = word_tokenizer()
    with pytest.raises(InputError, match="the tokenizer of model m has no chat template"):
        require_chat_template(tokenizer, "m")
    tokenizer.chat_template = "{{ messages }}"
    require_chat_template(tokenizer, "m")


def test_a_hub_adapter_without_safetensors_is_refused(tmp_path, monkeypatch):
    config = tmp_path / "adapter_config.json"
    config.write_text('{"base_model_name_or_path": "org/base"}')
    monkeypatch.setattr(models, "unreachable", lambda name, kind, **_: None)
    monkeypatch.setattr(models, "cached_file", lambda name, file, **_: str(config) if file == config.name else None)
    assert "has no adapter_model.safetensors" in refused(load_model, "org/adapter")


def test_a_revision_is_that_of_weights_tokenizer_and_adapter(folder, adapter, tmp_path, monkeypatch):
    later, later_adapter = tmp_path / "later", tmp_path / "later-adapter"
    tiny_llama(seed=1).save_pretrained(later)
    tokenizer = word_tokenizer()
    tokenizer.chat_template = "{{ messages }}"
    tokenizer.save_pretrained(later)
    shutil.copytree(adapter, later_adapter)
    weights = load_file(later_adapter / "adapter_model.safetensors")
    save_file({name: 2 * tensor for name, tensor in weights.items()}, later_adapter / "adapter_model.safetensors")
    models_in_cache(
        monkeypatch,
        tmp_path / "hub",
        {
            "org/model": {"main": folder, "v2": later},
            "org/adapter": {"main": adapter, "v2": later_adapter},
        },
    )
    for revision, expected in ((None, folder), ("main", folder), ("v2", later)):
        model, tokenizer = load_model_and_tokenizer("org/model", revision=revision)
        assert (tokenizer.chat_template is not None) == (expected == later)
        assert torch.equal(model(IDS).logits, load_model(str(expected))(IDS).logits)
    for revision, expected in ((None, adapter), ("v2", later_adapter)):
        model = load_model("org/adapter", revision=revision)
        assert torch.equal(model(IDS).logits, load_model(str(expected))(IDS).logits)
    assert "--model_revision v2: " in refused(lambda source: load_model(source, revision="v2"), folder)
    assert "--model_revision v2: " in refused(lambda source: load_tokenizer(source, revision="v2"), adapter)
    assert "revision/v9" in refused(lambda source: load_model(source, revision="v9"), "org/model")
