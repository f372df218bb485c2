"""Models and tokenizers, loaded from a folder, an adapter folder or the Hub in safetensors only; their modes."""

import json
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import torch
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import cached_file
from trl.trainer.utils import create_model_from_path

from holdfast.errors import InputError
from holdfast.hub import is_hub_id, reason, unreachable

_ADAPTER_CONFIG = "adapter_config.json"
_ADAPTER_WEIGHTS = "adapter_model.safetensors"
_MAIN = "main"
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.pkl", "*.ckpt")
# Any one of these holds a vocabulary; without one, transformers may make up an empty tokenizer.
_VOCABULARIES = ("tokenizer.json", "*.model", "vocab.json", "vocab.txt", "*.tiktoken", "tekken.json")


def load_tokenizer(
    source: str, *, base_model: str | None = None, revision: str | None = None
) -> PreTrainedTokenizerBase:
    """Load the tokenizer of a model.

    Args:
        source: A model folder, an adapter folder (whose own tokenizer comes before its base model's) or a Hub id.
        base_model: As for `load_model`.
        revision: As for `load_model`.

    Returns:
        The tokenizer.

    Raises:
        InputError: If the source cannot be read or has no tokenizer.
    """
    _check_exists(source, revision)
    folder = Path(source).expanduser()
    base = base_of(source, base_model, revision)
    if folder.is_dir() and not _has_any(folder, _VOCABULARIES):
        if base is not None:
            _check_base(base, source)
            return load_tokenizer(base)
        raise InputError(f"model folder {source} has no tokenizer (tokenizer.json); save the tokenizer in it")
    try:
        return AutoTokenizer.from_pretrained(_location(source), revision=revision or _MAIN, trust_remote_code=False)
    except Exception as error:  # a broken file raises whatever its parser raises
        if base is not None and not folder.is_dir():
            _check_base(base, source)
            return load_tokenizer(base)
        raise InputError(f"the tokenizer of model {source} cannot be loaded ({reason(error)})") from error


def load_model(
    source: str,
    *,
    trainable: bool = False,
    base_model: str | None = None,
    revision: str | None = None,
    architecture: Any = AutoModelForCausalLM,
    **kwargs: Any,
) -> PreTrainedModel | PeftModel:
    """Load a model, a causal language model unless told otherwise, in float32 likewise, from safetensors only.

    Args:
        source: A model folder, an adapter folder (which is put on its base model) or a Hub id.
        trainable: Whether the weights of an adapter are to be trained.
        base_model: What to put an adapter on, and to name in it when it is saved, instead of the base model that it
            names; of no account for a full model.
        revision: A branch, tag or commit of the source, where that is on the Hub; its main branch if not given.
        architecture: transformers' class that loads it.
        **kwargs: Passed to `from_pretrained` of the (base) model, such as `dtype` or `attn_implementation`.

    Returns:
        The model, or the adapter on its base model.

    Raises:
        InputError: If the source cannot be read, holds a pickle instead of safetensors, or needs code of its own.
    """
    if kwargs.pop("trust_remote_code", False):
        raise InputError("--trust_remote_code is not supported: a model must not bring code of its own")
    _check_exists(source, revision)
    base = base_of(source, base_model, revision)
    if base is not None:
        _check_adapter_weights(source, revision)
        _check_base(base, source)
        model = load_model(base, architecture=architecture, **kwargs)
        if isinstance(model, PeftModel):
            raise InputError(f"adapter {source} is on another adapter, {base}; merge that into its base model first")
        try:
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", message=".*missing adapter keys")
                adapter = PeftModel.from_pretrained(model, _location(source), is_trainable=trainable, revision=revision)
            # Once more: what is missing peft draws at random, with a warning; what has no place only this tells.
            found = adapter.load_adapter(
                _location(source), adapter.active_adapter, is_trainable=trainable, revision=revision
            )
        except Exception as error:  # peft raises many kinds for an adapter that does not fit
            raise InputError(f"adapter {source} cannot be put on its base model {base} ({reason(error)})") from error
        for odd, what in ((found.missing_keys, "it has none for"), (found.unexpected_keys, "there is no place for")):
            if odd:
                raise InputError(
                    f"adapter {source} cannot be put on its base model {base}: {what} {len(odd)} of the weights, the "
                    f"first being {odd[0]}"
                )
        for config in adapter.peft_config.values():
            config.base_model_name_or_path = base
        return adapter
    folder = Path(source).expanduser()
    if folder.is_dir():
        _check_model_folder(source, folder)
    # TRL would spread it over all GPUs, and a model that is spread so can be trained by no distributed run.
    kwargs.setdefault("device_map", None)
    try:
        model, report = create_model_from_path(
            _location(source),
            architecture=architecture,
            revision=revision or _MAIN,
            use_safetensors=True,
            trust_remote_code=False,
            output_loading_info=True,
            **kwargs,
        )
    except Exception as error:  # broken configs and weights raise many kinds, and so do packages that are missing
        raise InputError(f"model {source} cannot be loaded{_asked_for(kwargs)} ({reason(error)})") from error
    if missing := sorted(report["missing_keys"]):  # transformers would draw them at random, and warn
        raise InputError(
            f"model {source} has no weights for {len(missing)} of the parameters of a {type(model).__name__} as its "
            f"config.json describes it, the first being {missing[0]}"
        )
    return model


def load_model_and_tokenizer(
    source: str,
    *,
    trainable: bool = False,
    base_model: str | None = None,
    revision: str | None = None,
    **kwargs: Any,
) -> tuple[PreTrainedModel | PeftModel, PreTrainedTokenizerBase]:
    """Load a model with the tokenizer that lies beside it. See `load_model` and `load_tokenizer`.

    Raises:
        InputError: As theirs; or a base model is given for what is no adapter.
    """
    tokenizer = load_tokenizer(source, base_model=base_model, revision=revision)
    model = load_model(source, trainable=trainable, base_model=base_model, revision=revision, **kwargs)
    if base_model is not None and not isinstance(model, PeftModel):
        raise InputError(f"--base_model {base_model}: {source} is no adapter, but a model of its own")
    return model, tokenizer


@contextmanager
def from_flag(flag: str) -> Iterator[None]:
    """Around the loading of a model that another flag than `--model` names: an error begins with that flag.

    Args:
        flag: Such as `--base`.

    Raises:
        InputError: As inside, begun with the flag.
    """
    try:
        yield
    except InputError as error:
        raise InputError(f"{flag}: {error}") from error


def require_chat_template(tokenizer: PreTrainedTokenizerBase, source: str) -> None:
    """Make sure that messages can be rendered.

    Args:
        tokenizer: The tokenizer.
        source: Where it is from, for the error.

    Raises:
        InputError: If it has no chat template.
    """
    if not tokenizer.chat_template:
        raise InputError(
            f"the tokenizer of model {source} has no chat template, which data made of messages need; "
            "add a chat_template.jinja or use plain prompts and completions"
        )


def require_model(model: Any, tokenizer: Any, *, trainer: str) -> None:
    """Make sure that a trainer is given something to train, and a tokenizer that goes with it.

    Args:
        model: A model, or where to load one from.
        tokenizer: Its tokenizer; None if it is to be loaded from where the model came from.
        trainer: What messages call the trainer.

    Raises:
        InputError: It is neither, or the tokenizer is none, or missing.
    """
    if not isinstance(model, str | PreTrainedModel | PeftModel):
        given = "nothing" if model is None else f"a {type(model).__name__}"
        raise InputError(
            f"{trainer} needs a model: one that is loaded, or a folder or Hub id to load it from; got {given}"
        )
    if tokenizer is None and not isinstance(model, str) and not model.config.name_or_path:
        raise InputError(
            f"{trainer} needs a processing_class, the model's tokenizer: the model does not say where it came from"
        )
    if not isinstance(tokenizer, PreTrainedTokenizerBase | None):
        raise InputError(f"the processing_class of {trainer} must be a tokenizer, got a {type(tokenizer).__name__}")


def base_model(model: PreTrainedModel | PeftModel) -> PreTrainedModel:
    """The model inside an adapter; one without an adapter itself."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def base_names(model: PreTrainedModel | PeftModel) -> list[str]:
    """The base models of an adapter, by folder or Hub id; none for a full model."""
    if not isinstance(model, PeftModel):
        return []
    return [config.base_model_name_or_path for config in model.peft_config.values()]


def adapts_tied_embeddings(model: PeftModel) -> bool:
    """Whether an adapter acts on an input or output embedding that shares its weight with the other."""
    embeddings = _embeddings(model)
    first, second = (getattr(embedding, "base_layer", embedding) for embedding in embeddings)
    is_tied = second is not None and first.weight is second.weight
    return is_tied and any(isinstance(embedding, BaseTunerLayer) for embedding in embeddings)


def merge(model: PeftModel) -> PreTrainedModel:
    """The model with its adapter merged into it, which computes the same; the adapter is used up.

    Tied input and output embeddings are parted where the adapter acts on one of them: peft would change both.
    """
    if adapts_tied_embeddings(model):
        config, (_, output) = model.get_base_model().config, _embeddings(model)
        head = getattr(output, "base_layer", output)
        head.weight = nn.Parameter(head.weight.detach().clone())
        config.get_text_config().tie_word_embeddings = config.tie_word_embeddings = False
    return cast(PreTrainedModel, model.merge_and_unload())


def _embeddings(model: PeftModel) -> tuple[Any, Any]:
    base = model.get_base_model()
    return base.get_input_embeddings(), base.get_output_embeddings()


def below_adapter(model: PeftModel) -> dict[str, nn.Parameter]:
    """The parameters of the model below a LoRA adapter, by the names that they have without it."""
    own = f".{model.base_model.prefix}"  # ".lora_"
    parameters = model.get_base_model().named_parameters()
    return {name.replace(".base_layer.", "."): parameter for name, parameter in parameters if own not in name}


def accelerator() -> torch.device:
    """Where models run that are not trained: on the accelerator, if there is one."""
    return torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")


@contextmanager
def eval_mode(model: nn.Module) -> Iterator[None]:
    """Switch to eval mode, and on leaving put back the mode that every single module was in."""
    modes = [(module, module.training) for module in model.modules()]
    try:
        model.eval()
        yield
    finally:
        for module, mode in modes:
            module.training = mode


def _check_exists(source: str, revision: str | None = None) -> None:
    """Check that the source is a folder, or a Hub repository that can be read and has the revision."""
    path = Path(source).expanduser()
    if path.is_dir():
        if revision not in (None, _MAIN):
            raise InputError(f"--model_revision {revision}: {source} is a folder, which has no revisions")
        return
    if path.exists():
        raise InputError(f"model {source} is a file; expected a model folder or a Hub id")
    missing = f"model {source} is neither a folder nor a model on the Hub"
    if not is_hub_id(source):
        raise InputError(f"{missing}; no such folder")
    if why := unreachable(source, "model", revision=revision):
        raise InputError(f"{missing} that can be read ({why})")


def _check_model_folder(source: str, folder: Path) -> None:
    if not (folder / "config.json").is_file():
        raise InputError(f"model folder {source} has no config.json (nor {_ADAPTER_CONFIG}); expected a model")
    _check_safetensors(source, folder, "*.safetensors")


def _check_adapter_weights(source: str, revision: str | None) -> None:
    folder = Path(source).expanduser()
    if folder.is_dir():
        _check_safetensors(source, folder, _ADAPTER_WEIGHTS)
    elif cached_file(source, _ADAPTER_WEIGHTS, revision=revision, _raise_exceptions_for_missing_entries=False) is None:
        raise InputError(f"adapter {source} has no {_ADAPTER_WEIGHTS}; pickles are not loaded")


def _check_safetensors(source: str, folder: Path, pattern: str) -> None:
    if any(folder.glob(pattern)):
        return
    pickles = sorted(path.name for kind in _PICKLES for path in folder.glob(kind))
    if pickles:
        raise InputError(
            f"model folder {source} holds a pickle ({pickles[0]}), which can run code when it is loaded; "
            "save the weights as safetensors"
        )
    raise InputError(f"model folder {source} has no weights (model.safetensors)")


def _check_base(base: str, adapter: str) -> None:
    """Check that an adapter's base model is there."""
    try:
        _check_exists(base)
    except InputError as error:
        raise InputError(f"adapter {adapter}: its base {error}; name it with --base_model") from error


def base_of(source: str, given: str | None = None, revision: str | None = None) -> str | None:
    """Return the base model of an adapter: the one given, or the one it names; None if the source is not an adapter.

    Args:
        source: A folder or Hub id.
        given: The base model, if it is known.
        revision: Of the source, where that is on the Hub.

    Raises:
        InputError: If the adapter names no base model, or itself.
    """
    config = cached_file(
        _location(source),
        _ADAPTER_CONFIG,
        revision=revision,
        _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_connection_errors=False,
    )
    if config is None or given is not None:
        return None if config is None else given
    try:
        base = json.loads(Path(config).read_text(encoding="utf-8"))["base_model_name_or_path"]
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(
            f"adapter {source} has an {_ADAPTER_CONFIG} that names no base model; name it with --base_model"
        ) from error
    if not isinstance(base, str) or not base or base == source:
        raise InputError(
            f"adapter {source} has an {_ADAPTER_CONFIG} that names no base model; name it with --base_model"
        )
    return base


def _asked_for(keywords: Mapping[str, Any]) -> str:
    """What was asked for that a package or a device may not have, as flags."""
    quantization = keywords.get("quantization_config")
    flags = {
        f"--attn_implementation {keywords.get('attn_implementation')}": "attn_implementation" in keywords,
        "--load_in_4bit": getattr(quantization, "load_in_4bit", False),
        "--load_in_8bit": getattr(quantization, "load_in_8bit", False),
    }
    return "".join(f" with {flag}" for flag, given in flags.items() if given)


def _location(source: str) -> str:
    path = Path(source).expanduser()
    return str(path) if path.is_dir() else source


def _has_any(folder: Path, patterns: tuple[str, ...]) -> bool:
    return any(True for pattern in patterns for _ in folder.glob(pattern))
