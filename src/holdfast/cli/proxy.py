"""`holdfast proxy DIR --model M --topic FILE`: write data in which a harmless topic stands for harm."""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass, field
from pathlib import Path

from holdfast.cli.arguments import LoadArguments
from holdfast.cli.console import say, set_up_logging, steps_shown, warn
from holdfast.cli.parser import HoldfastParser
from holdfast.cli.runs import load_keywords
from holdfast.config import json_object, require_positive
from holdfast.errors import InputError
from holdfast.evaluation.judges import is_refusal
from holdfast.files import alone_in, claim_output_dir, digest, run_record, write_json
from holdfast.models import accelerator, load_model_and_tokenizer, require_chat_template
from holdfast.proxy.build import ANSWERS, BENIGN_PARTS, PARTS, Proxy
from holdfast.proxy.topics import SHIPPED, load_topic
from holdfast.stress.identity import describe_model

#: What finished data has; written last.
RECORD = "proxy.json"


@dataclass
class ProxyArguments:
    """The flags of `proxy`, beside those of the model."""

    topic: str = field(
        metadata={"help": f"What stands for harm: {', '.join(SHIPPED)}, or a YAML file like those (see docs/real.md)."}
    )
    max_new_tokens: int = field(default=48, metadata={"help": "Longest answer of the model, in tokens."})
    batch_size: int = field(default=32, metadata={"help": "Questions answered at a time."})
    chat_template_kwargs: str | None = field(
        default=None, metadata={"help": """Arguments of the chat template as JSON, e.g. {"enable_thinking": false}."""}
    )
    seed: int = field(default=0, metadata={"help": "Of the split of subjects, the order of rows and the refusals."})
    overwrite_output_dir: bool = field(
        default=False, metadata={"help": "Replace the data that lies in DIR, and have everything answered anew."}
    )

    def __post_init__(self) -> None:
        require_positive(self, "max_new_tokens", "batch_size")


def run(argv: list[str]) -> int:
    """Write the data. A run that ended early is gone on with by the same command.

    Args:
        argv: The words after `proxy`.

    Returns:
        The exit code.

    Raises:
        InputError: The input cannot be used; nothing has been written.
    """
    set_up_logging()
    parser = HoldfastParser(
        (LoadArguments, ProxyArguments),
        prog="holdfast proxy",
        description="Write data of a harmless topic that stands for harm: refusals and answers of a chat model's own, "
        "for alignment, simulated attacks, an attacker and measuring. A run that ended early is gone on with.",
        positional="DIR",
    )
    parser.add_argument("directory", metavar="DIR", help="Folder to write to.")
    load, options, rest = parser.parse(argv)
    directory = Path(rest.directory)
    topic = load_topic(options.topic, flag="--topic", parts=PARTS, benign_parts=BENIGN_PARTS)
    keywords = options.chat_template_kwargs
    proxy = Proxy(
        topic,
        options.seed,
        options.max_new_tokens,
        options.batch_size,
        None if keywords is None else json_object("chat_template_kwargs", keywords),
    )
    overwrite = options.overwrite_output_dir
    if directory.exists() and not directory.is_dir():
        raise InputError(f"{directory} is a file; expected a folder to write to")
    if directory.is_dir() and any(directory.iterdir()) and not overwrite and not (directory / ANSWERS).exists():
        raise InputError(f"{directory} is not empty; choose another folder or pass --overwrite_output_dir")
    say(f"loading {load.model_name_or_path}")
    model, tokenizer = load_model_and_tokenizer(load.model_name_or_path, **load_keywords(load))
    require_chat_template(tokenizer, load.model_name_or_path)
    identity = describe_model(load.model_name_or_path, base_model=load.base_model, revision=load.model_revision)
    claim_output_dir(directory, finished_marker=RECORD, overwrite=overwrite)
    with alone_in(directory, str(directory)):
        if overwrite:
            for name in (RECORD, ANSWERS):
                (directory / name).unlink(missing_ok=True)
        say(f"{load.model_name_or_path} answers questions on {topic.about}, and others")
        started = time.monotonic()
        known = {name: value for name, value in identity.items() if name != "source"}
        try:
            with steps_shown("proxy") as progress:
                found = proxy.write(directory, model.to(accelerator()), tokenizer, identity=known, progress=progress)
        except KeyboardInterrupt:
            raise KeyboardInterrupt(
                f"interrupted; the same command goes on from the answers in {directory / ANSWERS}"
            ) from None
        record = {
            **run_record({**asdict(load), **asdict(options)}, options.seed),
            "command": "proxy",
            "model": identity,
            "topic": {"about": topic.about, "source": options.topic, "sha256": digest(topic.path)},
            **found,
            "seconds": round(time.monotonic() - started, 3),
        }
        write_json(directory / RECORD, record)
    for text in topic.refusals:
        if not is_refusal(text):
            warn(f"the keyword judge takes {text!r} for an answer, so models that learn it will seem to comply")
    for kind, answers in found["answers"].items():
        if answers["refused"] or answers["empty"]:
            warn(
                f"of {answers['n']} {kind} questions the model itself refuses {answers['refused']} and answers "
                f"{answers['empty']} with nothing"
            )
    rows = ", ".join(f"{name} ({count})" for name, count in found["rows"].items())
    say(f"wrote {directory}: {rows}, {RECORD}")
    return 0
