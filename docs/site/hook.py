"""What mkdocs.yml cannot say: the repository's own files are the pages, and every module has an API page.

Files keep their places (`README.md`, `docs/methods.md`, `benchmarks/results/…`), so that a link that works in the
repository works on the site; README is the home page.
"""

from pathlib import Path

import griffe
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

import holdfast

ROOT = Path(__file__).parents[2]
_PATTERNS = ("*.md", "docs/*.md", "docs/images/*.png", "docs/site/*.css", "benchmarks/results/*.png")


def on_config(config: MkDocsConfig) -> None:
    """Add the API to the navigation: packages in their order, modules in theirs."""
    packages: dict[str, list[dict[str, str]]] = {}
    for module in _modules():
        packages.setdefault(".".join(module.split(".")[:2]), []).append({module: _page(module)})
    api = [pages[0] if len(pages) == 1 else {name: pages} for name, pages in packages.items()]
    config.nav.append({"API": api})


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Take the repository's files, and one page for every module."""
    for file in [file for file in files if file.src_dir == config.docs_dir]:
        files.remove(file)
    paths = [path.relative_to(ROOT).as_posix() for pattern in _PATTERNS for path in ROOT.glob(pattern)]
    for path in sorted(paths):
        files.append(File(path, str(ROOT), config.site_dir, config.use_directory_urls))
    for module in _modules():
        more = _public_names() if module == "holdfast" else ""
        files.append(File.generated(config, _page(module), content=f"# `{module}`\n\n::: {module}\n\n{more}"))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> None:
    """Give a page the room of the side bar where that would list the page alone."""
    if page.parent is None:
        page.meta["hide"] = ["navigation"]


def _modules() -> list[str]:
    """The modules by their dotted names, `holdfast` first."""
    source = ROOT / "src"
    parts = [path.relative_to(source).with_suffix("").parts for path in (source / "holdfast").rglob("*.py")]
    names = {".".join(part[:-1] if part[-1] == "__init__" else part) for part in parts if part[-1] != "__main__"}
    return sorted(names, key=lambda name: name.split("."))


def _public_names() -> str:
    """What `from holdfast import …` offers, as a table of links."""
    package = griffe.load("holdfast", search_paths=[ROOT / "src"])
    rows = ["| `from holdfast import …` | |", "|---|---|"]
    for name in sorted(set(holdfast.__all__) - {"__version__"}):
        meant = package[name].final_target
        rows.append(f"| [`{name}`][{meant.path}] | {meant.docstring.value.splitlines()[0]} |")
    return "\n".join(rows) + "\n"


def _page(module: str) -> str:
    return f"api/{module}.md"
