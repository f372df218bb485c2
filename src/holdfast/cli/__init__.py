"""The `holdfast` command: finds the command's module, runs it, and turns its errors into one sentence and an exit code.

Nothing heavy is imported before a command runs, so `holdfast --help` answers at once.

Exit codes: 0 done, or stopped by SIGTERM with a checkpoint to go on from · 1 training or writing failed · 2 the input
cannot be used, nothing was written · 130 interrupted. Of `gate`: 0 pass · 1 fail · 2 refused · 3 inconclusive.
"""

from __future__ import annotations

import os
import signal
import sys
from textwrap import fill
from typing import NamedTuple

from holdfast import __version__
from holdfast.errors import InputError, Stopped, TrainingError
from holdfast.importing import import_heavy

__all__ = ["main"]


class _Command(NamedTuple):
    """A command: the module that runs it, what it does, and the methods it chooses between (none for most)."""

    module: str
    summary: str
    methods: dict[str, str]


_COMMANDS = {
    "demo": _Command("holdfast.cli.demo", "harden and attack the built-in organism, with table and picture", {}),
    "organism": _Command("holdfast.cli.organism", "write the built-in organism as ordinary model and data files", {}),
    "proxy": _Command(
        "holdfast.cli.proxy", "write data of a harmless topic that stands for harm, for a chat model of your own", {}
    ),
    "data": _Command("holdfast.cli.data", "list the data sets that are known by name, or show one", {}),
    "align": _Command(
        "holdfast.cli.align",
        "align a model before its release",
        {
            "sft": "ordinary supervised fine-tuning, the baseline",
            "patcher": "Patcher: stays safe under simulated full-parameter attacks of many steps",
            "vaccine": "Vaccine: learns under the worst small shift of the attention outputs",
            "booster": "Booster: keeps a step of harmful fine-tuning from lowering the harmful loss",
            "antibody": "Antibody: a flat harmful loss, and refusals that survive a harmful step",
        },
    ),
    "finetune": _Command(
        "holdfast.cli.finetune",
        "train a model on a user's data without losing its safety",
        {
            "sft": "ordinary supervised fine-tuning, the baseline",
            "lisa": "Lisa (BSO with --rho 0): alternates with safety data, held to where the other left off",
            "spard": "SPARD: projects every step back to where the safety loss is low",
            "antibody": "Antibody: learns less from rows that the model would rather refuse",
        },
    ),
    "audit": _Command(
        "holdfast.cli.audit", "tell which rows of an upload a model would rather refuse, without training", {}
    ),
    "repair": _Command(
        "holdfast.cli.repair",
        "repair a fine-tuned model that lost its safety",
        {"antidote": "Antidote: prunes the weights that harmful data uses most, without training"},
    ),
    "attack": _Command(
        "holdfast.cli.attack",
        "attack a model the way an adversary would, and measure what is left of its safety",
        {
            "full": "fine-tune all parameters on harmful data",
            "lora": "fine-tune a low-rank adapter on harmful data",
            "ablation": "take the refusal direction out of all that writes to the residual stream",
            "dropping": "take the outputs of a layer away",
            "base": "take weights back to those of the public base model",
            "rounding": "round the weights to a few bits",
            "pruning": "zero the smallest weights",
            "noise": "add Gaussian noise to the weights",
            "prefill": "begin the answers for the model",
            "demonstrations": "show the model harmful exchanges before every prompt",
            "soft-prompt": "train vectors that stand before every prompt",
            "best-of-n": "sample several answers, of which the worst counts",
            "raw": "ask without the chat template",
        },
    ),
    "stress": _Command(
        "holdfast.cli.stress", "find the cheapest way to break a model among all attacks, tuned, and certify it", {}
    ),
    "evaluate": _Command("holdfast.cli.evaluate", "generate answers, judge them, and report rates with intervals", {}),
    "judge": _Command("holdfast.cli.judge", "judge saved answers again, by other judges", {}),
    "report": _Command("holdfast.cli.report", "make a page and a model card's section of what stress tests found", {}),
    "gate": _Command("holdfast.cli.gate", "hold the certificate of a stress test against a policy", {}),
}


#: Where what commands do begins in the usage.
_INDENT = " " * 19


def main(argv: list[str] | None = None) -> int:
    """Run one command.

    Args:
        argv: The words after `holdfast`; those of the process when None.

    Returns:
        The exit code (see the module's docstring).
    """
    # Several threads that spin against another process can make a small step take seconds instead of milliseconds, and
    # bits depend on their number. Whoever has a large model and many cores sets another one; GPUs do not care.
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    try:
        return _dispatch(list(sys.argv[1:] if argv is None else argv))
    except InputError as error:
        return _fail(str(error), 2)
    except TrainingError as error:
        return _fail(str(error), 1)
    except Stopped as stopped:
        return _fail(str(stopped), 0)
    except KeyboardInterrupt as interrupt:
        if argv is None:  # nothing follows but the process's end, into which a second one would write a traceback
            signal.signal(signal.SIGINT, signal.SIG_IGN)
        return _fail(_said(interrupt), 130)
    except SystemExit as leave:  # argparse leaves this way after --help and after an error it has already reported
        return leave.code if isinstance(leave.code, int) else 0
    except Exception as error:
        from holdfast.cli.boundary import failure  # whatever failed has imported what this imports

        if (sentence := failure(error)) is None:
            raise
        return _fail(sentence, 1)


def _said(interrupt: BaseException | None) -> str:
    """What an interrupt says, or the one that it came into: whoever interrupts twice is told no less."""
    while isinstance(interrupt, KeyboardInterrupt) and not str(interrupt):
        interrupt = interrupt.__context__
    return str(interrupt) if isinstance(interrupt, KeyboardInterrupt) else "interrupted"


def _dispatch(argv: list[str]) -> int:
    name, rest = (argv[0], argv[1:]) if argv else ("", [])
    if name in ("-h", "--help"):
        sys.stdout.write(_usage())
        return 0
    if name == "--version":
        sys.stdout.write(f"holdfast {__version__}\n")
        return 0
    if name not in _COMMANDS:
        problem = f"unknown command {name!r}" if name else "no command given"
        return _fail(f"{problem}; choose from {', '.join(_COMMANDS)} (holdfast --help says what they do)", 2)
    command = _COMMANDS[name]
    if not command.methods:
        return int(import_heavy(command.module, for_good=True).run(rest))
    method, rest = (rest[0], rest[1:]) if rest else ("", [])
    if method in ("-h", "--help"):
        sys.stdout.write(_method_usage(name, command))
        return 0
    if method not in command.methods:
        problem = f"unknown method {method!r}" if method else "no method given"
        return _fail(f"{problem}; usage: holdfast {name} {{{','.join(command.methods)}}} [options]", 2, name)
    return int(import_heavy(command.module, for_good=True).run(method, rest))


def _fail(message: str, code: int, command: str = "") -> int:
    """Write one line to standard error, whatever line breaks the message came with."""
    sys.stderr.write(f"{f'holdfast {command}'.strip()}: {' '.join(message.split())}\n")
    return code


def _usage() -> str:
    lines = [
        "usage: holdfast COMMAND [options]",
        "",
        "Harden language models against malicious fine-tuning, and measure how hard they are to break.",
        "",
        "commands:",
    ]
    for name, command in _COMMANDS.items():
        lines.append(f"  {f'{name} METHOD' if command.methods else name:<16} {command.summary}")
        if command.methods:
            lines.append(
                fill(f"({', '.join(command.methods)})", 100, initial_indent=_INDENT, subsequent_indent=_INDENT)
            )
    lines += [
        "",
        "  --version        print the version",
        "",
        "`holdfast COMMAND --help` lists a command's options; all of them may stand in a YAML file given as --config.",
    ]
    return "\n".join(lines) + "\n"


def _method_usage(name: str, command: _Command) -> str:
    width = max(10, *map(len, command.methods))
    methods = [f"  {method:<{width}} {summary}" for method, summary in command.methods.items()]
    lines = [
        f"usage: holdfast {name} {{{','.join(command.methods)}}} [options]",
        "",
        f"{command.summary[0].upper()}{command.summary[1:]}.",
        "",
        "methods:",
        *methods,
        "",
        f"`holdfast {name} METHOD --help` lists a method's options.",
    ]
    return "\n".join(lines) + "\n"
