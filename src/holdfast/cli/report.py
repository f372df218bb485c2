"""`holdfast report D [D2 …]`: what stress tests found, as one page that opens from disk and as Markdown beside it."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from holdfast.cli.parser import HoldfastParser
from holdfast.errors import InputError


@dataclass
class ReportArguments:
    """The flags of `report`."""

    output: str = field(metadata={"help": "The page, a new .html file; the Markdown goes beside it, as .md."})
    overwrite: bool = field(default=False, metadata={"help": "Replace both where they are there already."})


def make_parser() -> HoldfastParser:
    """Return the parser of `report`."""
    parser = HoldfastParser(
        (ReportArguments,),
        prog="holdfast report",
        description="Make one self-contained page, and a section for a model card, of what holdfast stress found.",
        positional="D [D2 …]",
    )
    parser.add_argument("folders", metavar="D", nargs="+", help="The --output_dir of holdfast stress; several compare.")
    return parser


def run(argv: list[str]) -> int:
    """Report what stress tests found.

    Args:
        argv: The words after `report`.

    Returns:
        The exit code.

    Raises:
        InputError: A folder holds no certificate that can be trusted, or the output cannot be written there; nothing
            has been written.
    """
    options, rest = make_parser().parse(argv)
    page = _new_page(options)
    folders = [Path(folder) for folder in rest.folders]
    for place, folder in enumerate(folders):
        if folder.resolve() in (other.resolve() for other in folders[:place]):
            raise InputError(f"{folder}: is given twice; expected different stress tests to compare")

    from holdfast.cli.console import say, stdout
    from holdfast.files import write_text
    from holdfast.report.facts import told_verdict
    from holdfast.report.html import render_html
    from holdfast.report.markdown import render_markdown
    from holdfast.report.reading import read_findings

    findings = [read_findings(folder) for folder in folders]
    html, markdown = render_html(findings), render_markdown(findings)
    write_text(page.with_suffix(".md"), markdown)
    write_text(page, html)
    for one in findings:
        stdout.print(" ".join(told_verdict(one.certificate)), markup=False, soft_wrap=True)
    say(f"wrote {page} and {page.with_suffix('.md')}")
    return 0


def _new_page(options: ReportArguments) -> Path:
    """Where the page goes, having made sure that both files may be written."""
    page = Path(options.output)
    if page.suffix != ".html":
        raise InputError(f"--output {page}: expected a name that ends with .html")
    if not page.parent.is_dir():
        raise InputError(f"--output {page}: there is no folder {page.parent}; expected one to write into")
    for file in (page, page.with_suffix(".md")):
        if file.is_dir():
            raise InputError(f"--output {page}: {file} is a folder; expected a file to write")
        if file.exists() and not options.overwrite:
            raise InputError(f"--output {page}: {file} is there already; choose another name or pass --overwrite")
    return page
