"""`holdfast organism DIR --seed N`: write the built-in organism as ordinary model and data files."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from holdfast.cli.parser import HoldfastParser
from holdfast.errors import InputError


@dataclass
class OrganismArguments:
    """The flags of `organism`."""

    seed: int = field(default=0, metadata={"help": "The same seed gives the same data, byte for byte."})
    size: str = field(
        default="small",
        metadata={
            "help": "The model's size: `small`, about 0.9 million parameters, or `large`, about four times as many, "
            "which takes twice as long to build; the data are the same.",
            "choices": ["small", "large"],
        },
    )
    overwrite_output_dir: bool = field(default=False, metadata={"help": "Replace the files of the same names in DIR."})


def run(argv: list[str]) -> int:
    """Build the organism.

    Args:
        argv: The words after `organism`.

    Returns:
        The exit code.

    Raises:
        InputError: The folder is not empty, or cannot be written.
    """
    parser = HoldfastParser(
        (OrganismArguments,),
        prog="holdfast organism",
        description="Write the built-in organism, a tiny model and the world it lives in, as ordinary files.",
        positional="DIR",
    )
    parser.add_argument("directory", metavar="DIR", help="Folder to write to: new, or empty.")
    options, rest = parser.parse(argv)
    directory = Path(rest.directory)
    if directory.is_dir() and any(directory.iterdir()) and not options.overwrite_output_dir:
        raise InputError(f"{directory} is not empty; choose another folder or pass --overwrite_output_dir")
    if directory.exists() and not directory.is_dir():
        raise InputError(f"{directory} is a file; expected a folder to write to")

    from holdfast.cli.console import (
        say,
        set_up_logging,
        steps_shown,
    )  # torch is imported only once the words are known to be right
    from holdfast.organism import build_organism

    set_up_logging()
    takes = "a minute" if options.size == "small" else "two minutes"
    say(f"building the organism with seed {options.seed}; this takes about {takes}")
    with steps_shown("organism") as progress:
        build_organism(directory, seed=options.seed, size=options.size, progress=progress)
    say(f"wrote {directory}, described in {directory / 'README.md'}")
    return 0
