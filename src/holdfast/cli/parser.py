"""TRL's argument parser, with one-sentence errors and recipes that are read exactly as flags are."""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Mapping, Sequence
from copy import copy
from dataclasses import MISSING, Field, fields
from pathlib import Path
from types import MappingProxyType, SimpleNamespace
from typing import Any, NoReturn

from trl import TrlParser

from holdfast.cli.effects import Effect, refuse_idle
from holdfast.errors import InputError
from holdfast.yaml_files import read_mapping

#: Short names for TRL's, accepted as flags and as recipe keys by every command that has the field.
_ALIASES = {"per_device_train_batch_size": "--batch_size", "optim": "--optimizer", "lr_scheduler_type": "--scheduler"}

#: Fields for which TRL invents a value that a command must not write to unasked.
_REQUIRED = frozenset({"output_dir"})

#: The flags that name a folder, a file or something on the Hub.
_NAMES = re.compile("^(output_dir|policy|model|model_name_or_path|.*_model|data|.*_data)$")

#: Those that may be empty though nothing is what they are without being given: a recipe's is taken back so.
_MAY_BE_EMPTY = frozenset({"system_prompt"})

#: Those that name data, which a recipe may also give as a mapping, or as a list of sources to be joined.
_DATA = re.compile("^(data|.*_data)$")

#: What YAML 1.2 reads as a number, and PyYAML does not.
_EXPONENT = re.compile(r"[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+")

#: argparse names an option by all of its spellings (`--max_steps/--max-steps`).
_SPELLINGS = re.compile(r"--[\w-]+(?:/--[\w-]+)+")


class _OneLineParser(argparse.ArgumentParser):
    """An argument parser whose errors are one line, without the usage: that has a hundred lines here."""

    def error(self, message: str) -> NoReturn:
        """Report the error on standard error and leave with exit code 2."""
        text = " ".join(_SPELLINGS.sub(_shortest_spelling, message).split())
        self.exit(2, f"{self.prog}: error: {text}\n")


class _HelpFormatter(argparse.ArgumentDefaultsHelpFormatter):
    """Names every option once: not also with hyphens, and not with a default that only says "not given"."""

    def _format_action_invocation(self, action: argparse.Action) -> str:
        names = [name for name in action.option_strings if "-" not in name[2:]]
        if not names or action.nargs == 0:
            return ", ".join(names) or super()._format_action_invocation(action)
        return f"{', '.join(names)} {self._format_args(action, action.dest.upper())}"

    def _get_help_string(self, action: argparse.Action) -> str | None:
        return action.help if action.default in (None, [], argparse.SUPPRESS) else super()._get_help_string(action)


class HoldfastParser(TrlParser, _OneLineParser):
    """Turns dataclasses into flags, as `TrlParser` does, and reads a recipe given as `--config recipe.yaml`.

    A recipe is a YAML mapping from flags to values. Its values go through the very same conversions and checks as
    words on the command line (YAML reads `1e-5` as text), and flags override it. Unlike in TRL,
    a recipe cannot set environment variables, and flags cannot be abbreviated.

    Args:
        dataclass_types: The dataclasses whose fields become flags.
        prog: The command as typed, for messages (`holdfast align patcher`).
        description: What the command does, for `--help`.
        positional: Positional arguments that will be added, for `--help`.
        effects: When flags play a part; given for nothing, they are told of.
        presets: Recipes that come with the package, by the names that `--preset` takes. What else is given may not
            contradict them.
        needs: The flags that each of these does not do without.
        others: The dataclasses of the commands beside it, by the words of each; of a flag that this command lacks, a
            message says which of them has it.
    """

    def __init__(
        self,
        dataclass_types: Sequence[type[Any]],
        *,
        prog: str,
        description: str | None = None,
        positional: str = "",
        effects: Sequence[Effect] = (),
        presets: Mapping[str, Path] = MappingProxyType({}),
        needs: Mapping[str, Sequence[str]] = MappingProxyType({}),
        others: Mapping[str, Sequence[type[Any]]] = MappingProxyType({}),
    ) -> None:
        keywords: dict[str, Any] = {
            "dataclass_types": dataclass_types,
            "prog": prog,
            "usage": " ".join(filter(None, [prog, positional, "[--config RECIPE.yaml] [options]"])),
            "description": description,
            "formatter_class": _HelpFormatter,
        }
        super().__init__(**keywords, allow_abbrev=False)
        self._effects = effects
        self._presets, self._needs = presets, needs
        self._others = others
        self.add_argument("--config", metavar="RECIPE.yaml", help="Recipe to take values from; flags override it.")
        if presets:
            self.add_argument(
                "--preset", choices=sorted(presets), help="Settings that were searched for, by their name."
            )

    @staticmethod
    def _parse_dataclass_field(parser: argparse.ArgumentParser, field: Field[Any]) -> None:
        changed = copy(field)
        # What argparse does not know: where an attack's knob is worth trying.
        changed.metadata = MappingProxyType({name: one for name, one in field.metadata.items() if name != "space"})
        if alias := _ALIASES.get(field.name):
            declared = field.metadata.get("aliases", [])
            aliases = [declared] if isinstance(declared, str) else list(declared)
            changed.metadata = MappingProxyType({**field.metadata, "aliases": list(dict.fromkeys([*aliases, alias]))})
        if field.name in _REQUIRED:
            changed.default = MISSING
        TrlParser._parse_dataclass_field(parser, changed)

    def parse(self, argv: Sequence[str]) -> tuple[Any, ...]:
        """Parse the command line and the recipe it names.

        Args:
            argv: The words after the command.

        Returns:
            One instance of each dataclass, in order, and a namespace with the remaining arguments: positional ones,
            and the `preset` of a command that has some.

        Raises:
            InputError: The recipe cannot be used, a dataclass refuses its values, or a flag would play no part.
            SystemExit: With code 2, after an error in the words themselves was reported.
        """
        locate = _OneLineParser(prog=self.prog, add_help=False, allow_abbrev=False)
        locate.add_argument("--config")
        recipe = locate.parse_known_args(argv)[0].config
        words = [] if recipe is None else self._words_of_recipe(Path(recipe))
        namespace, unknown = self.parse_known_args([*words, *argv])
        if unknown:
            self.error(f"unrecognized arguments: {' '.join(unknown)}{self._flag_of_others(unknown)}")
        preset: str | None = getattr(namespace, "preset", None)
        presets = [] if preset is None else self._words_of_preset(preset, [*words, *argv])
        if presets:
            words = [*presets, *words]
            namespace = self.parse_args([*words, *argv])
        given = vars(namespace)
        given.pop("config")
        unset = {action.dest for action in self._actions if action.default is None} - _MAY_BE_EMPTY
        typed_as = {
            action.dest: f"--{action.dest}" if action.option_strings else action.metavar for action in self._actions
        }
        for name in (name for name, value in given.items() if value == ""):  # as a shell's variable that is not set
            if _NAMES.search(name) or name in unset:
                self.error(
                    f"argument {typed_as[name]}: expected a {'name' if _NAMES.search(name) else 'value'}, got ''"
                )
        if not 0 <= given.get("seed", 0) < 2**32:
            self.error(f"argument --seed: expected a number from 0 to {2**32 - 1}, got {given['seed']}")
        built = []
        for dataclass_type in self.dataclass_types:
            names = [field.name for field in fields(dataclass_type) if field.init]
            built.append(_build(dataclass_type, {name: given.pop(name) for name in names}))
        values = SimpleNamespace(**{field.name: getattr(one, field.name) for one in built for field in fields(one)})
        typed = set(self._given(argv))
        if presets:  # without a part of it, it would be another setting under its name
            try:
                refuse_idle(self._effects, values, typed=self._given(presets), in_recipe=())
            except InputError as error:
                raise InputError(f"--preset {preset}: {error}") from error
        refuse_idle(self._effects, values, typed=typed, in_recipe=self._given(words).keys() - typed)
        return (*built, namespace)

    def _words_of_preset(self, preset: str, words: Sequence[str]) -> list[str]:
        """A preset as command-line words, having checked that no other words say otherwise, and none is missing."""
        found = self._words_of_recipe(self._presets[preset])
        own, its = self._given(words), self._given(found)
        for name in its.keys() & own.keys():
            if its[name] != own[name]:
                raise InputError(f"--preset {preset} has another --{name} than the one that is given; leave out one")
        needed = [f"--{name}" for name in self._needs.get(preset, ())]
        if missing := [flag for flag in needed if flag.removeprefix("--") not in own]:
            raise InputError(f"--preset {preset} needs {', '.join(needed)}; missing: {', '.join(missing)}")
        return found

    def _flag_of_others(self, words: Sequence[str]) -> str:
        """Which commands beside this one have the first of these flags that one of them has."""
        for flag in words:
            name = flag.partition("=")[0].removeprefix("--").replace("-", "_")
            having = [
                command
                for command, types in self._others.items()
                if flag.startswith("--") and any(entry.name == name for one in types for entry in fields(one))
            ]
            if having:
                return f" (--{name} is a flag of {' and '.join(having)})"
        return ""

    def _given(self, words: Sequence[str]) -> dict[str, Any]:
        """What these words set, by name, whether to its default or not; they need not be all that is required."""
        unset = object()
        required = [action for action in self._actions if action.required]
        try:
            for action in required:
                action.required = False
            empty = argparse.Namespace(**{action.dest: unset for action in self._actions})
            found = vars(self.parse_known_args(list(words), empty)[0])
        finally:
            for action in required:
                action.required = True
        return {name: value for name, value in found.items() if value is not unset}

    def _words_of_recipe(self, path: Path) -> list[str]:
        """Return the recipe as command-line words, having checked that each of them can be used."""
        words: list[str] = []
        keys: dict[str, str] = {}
        for key, value in read_mapping(path, flag="--config", of="flags to values").items():
            flag = f"--{key}"
            action = self._option_string_actions.get(flag)
            if action is None or key in ("config", "help"):
                raise InputError(
                    f"{path}: unknown key {key!r}; keys are the flags that `{self.prog} --help` lists"
                    f"{self._flag_of_others([flag])}"
                )
            if action.dest in keys:
                raise InputError(f"{path}: {keys[action.dest]!r} and {key!r} set the same value; keep one of them")
            keys[action.dest] = str(key)
            words += _words(path, flag, action, value)
        # The recipe is parsed on its own first, so that an error names the file it is in.
        prog = self.prog
        try:
            self.prog = f"{prog}: {path}"
            self._given(words)
        finally:
            self.prog = prog
        return words


def _shortest_spelling(match: re.Match[str]) -> str:
    spellings = [spelling for spelling in match.group().split("/") if "-" not in spelling[2:]]
    return min(spellings, key=len) if spellings else match.group()


def _words(path: Path, flag: str, action: argparse.Action, value: Any) -> list[str]:
    """Return the words that set an option to a YAML value on the command line."""
    if value is None:
        return [] if action.default is None else [f"{flag}=none"]
    if action.nargs == 0:
        raise InputError(f"{path}: write {action.dest}: false instead of the key {flag[2:]!r}")
    if isinstance(value, bool) and action.const is True and action.type is str:
        return [flag] if value else []  # `fsdp` also takes words, and would take "true" for one
    if action.nargs == "+":
        return [flag, *(_word(path, flag, item) for item in (value if isinstance(value, list) else [value]))]
    if isinstance(value, Mapping) or (isinstance(value, list) and _DATA.match(action.dest)):
        inner = _with_share(value) if _DATA.match(action.dest) else _with_numbers(value)
        return [f"{flag}={json.dumps(inner, default=str)}"]
    return [f"{flag}={_word(path, flag, value)}"]


def _with_numbers(value: Any) -> Any:
    """A value of a mapping in which `1e-5`, that PyYAML reads as text, is the number that it is on a command line."""
    if isinstance(value, Mapping):
        return {key: _with_numbers(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_with_numbers(inner) for inner in value]
    return float(value) if isinstance(value, str) and _EXPONENT.fullmatch(value) else value


def _with_share(source: Any) -> Any:
    """A source of data, or a list of them, with its share likewise; other values may be meant as text."""
    if isinstance(source, list):
        return [_with_share(one) for one in source]
    if isinstance(source, Mapping):
        return {key: _with_numbers(value) if key == "fraction" else value for key, value in source.items()}
    return source


def _word(path: Path, flag: str, value: Any) -> str:
    if isinstance(value, (list, Mapping)) or value is None:
        raise InputError(f"{path}: {flag[2:]} takes a single value, not {json.dumps(value, default=str)}")
    return str(value).lower() if isinstance(value, bool) else str(value)


def _build(dataclass_type: type[Any], values: dict[str, Any]) -> Any:
    """Construct a dataclass; what it refuses is the user's input."""
    try:
        return dataclass_type(**values)
    except InputError:
        raise
    except json.JSONDecodeError as error:
        flag = next((f"--{name}" for name, value in values.items() if value == error.doc), "a flag")
        raise InputError(f"{flag}: {error.doc!r} is not valid JSON ({error.msg})") from error
    except OSError as error:  # files may be named, too
        for name in (name for name, value in values.items() if value is not None and value == error.filename):
            raise InputError(f"--{name} {error.filename} cannot be read ({error.strerror})") from error
        raise InputError(str(error)) from error
    except ValueError as error:
        raise InputError(str(error)) from error
    except TypeError as error:  # an unknown key of accelerate's configuration, which is built in there
        if "unexpected keyword argument" not in str(error):
            raise
        raise InputError(str(error)) from error
