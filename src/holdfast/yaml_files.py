"""YAML files that hold one mapping: recipes, policies and topics."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from holdfast.errors import InputError
from holdfast.files import read_text


class _Loader(yaml.SafeLoader):
    """Reads only `true` and `false` as booleans, so that `save_strategy: no` and `eval_strategy: no` mean the word.

    A key that stands twice is an error, as YAML has it: PyYAML takes the last one.
    """

    yaml_implicit_resolvers = {
        first: [(tag, pattern) for tag, pattern in resolvers if not tag.endswith(":bool")]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """A mapping whose keys are all different."""
        lines: dict[str, int] = {}
        for key, _ in node.value:
            name, line = str(key.value), key.start_mark.line + 1
            if name in lines:
                raise yaml.YAMLError(f"the key {name!r} of line {lines[name]} stands again in line {line}")
            lines[name] = line
        return super().construct_mapping(node, deep)


_BOOLEAN = re.compile("^(?:true|false)$", re.IGNORECASE)
_Loader.add_implicit_resolver("tag:yaml.org,2002:bool", _BOOLEAN, list("tTfF"))


def read_mapping(path: Path | str, *, flag: str, of: str) -> Mapping[Any, Any]:
    """Read a YAML file that holds one mapping.

    Args:
        path: The file.
        flag: The flag that named it, for errors.
        of: What the mapping is of, for errors: "flags to values".

    Returns:
        The mapping, in the file's order.

    Raises:
        InputError: The file cannot be read, or is no such mapping.
    """
    text = read_text(path, named=f"{flag} {path}")
    try:
        found = yaml.load(text, Loader=_Loader)  # a SafeLoader
    # Values that are tagged or look like a date, a number or a list and are none end in errors of Python's own.
    except (yaml.YAMLError, ValueError, AttributeError, RecursionError) as error:
        raise InputError(f"{flag} {path}: is not valid YAML ({' '.join(str(error).split())})") from error
    if not isinstance(found, Mapping):
        what = "nothing" if found is None else f"a {type(found).__name__}"
        raise InputError(f"{flag} {path}: expected a YAML mapping of {of}, found {what}")
    return found
