"""Build the sdist and the wheel, and use the wheel as a stranger would: in a fresh environment, far from this folder.

Checks the metadata, that every file of the package is in the wheel, that the wheel installs with the pinned versions,
alone and with every extra, and that the installed command works. What is built lies in `dist/`.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import venv
import zipfile
from email.parser import Parser
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
#: What a source distribution is of no use without.
NEEDED = ("README.md", "LICENSE", "Makefile", "constraints.txt", "pyproject.toml", "tests/conftest.py", "recipes/paper")


def main() -> None:
    """Build, check, install, use."""
    os.environ["PIP_CONSTRAINT"] = str(ROOT / "constraints.txt")  # also where `build` installs the build's own needs
    shutil.rmtree(ROOT / "dist", ignore_errors=True)
    run(sys.executable, "-m", "build", "--outdir", "dist", ".", cwd=ROOT)
    (wheel,), (sdist,) = (ROOT / "dist").glob("*.whl"), (ROOT / "dist").glob("*.tar.gz")
    run(sys.executable, "-m", "twine", "check", "--strict", wheel, sdist)
    metadata = check_contents(wheel, sdist)
    with tempfile.TemporaryDirectory() as name:
        use(wheel, metadata.get_all("Provides-Extra", []), Path(name))
    print(f"{wheel.name} and {sdist.name} are in dist/")


def check_contents(wheel: Path, sdist: Path):
    """Compare what was packed with what lies in `src`; return the wheel's metadata."""
    files = [path for path in (ROOT / "src/holdfast").rglob("*") if path.is_file() and path.suffix != ".pyc"]
    with zipfile.ZipFile(wheel) as packed:
        names = set(packed.namelist())
        metadata = Parser().parsestr(packed.read(next(n for n in names if n.endswith(".dist-info/METADATA"))).decode())
    missing = {file.relative_to(ROOT / "src").as_posix() for file in files} - names
    assert not missing, f"not in the wheel: {sorted(missing)}"
    assert "holdfast/py.typed" in names, "the wheel has no py.typed"
    foreign = {name for name in names if not name.startswith(("holdfast/", "holdfast_llm-"))}
    assert not foreign, f"does not belong in the wheel: {sorted(foreign)}"
    with tarfile.open(sdist) as packed:
        sources = {name.partition("/")[2] for name in packed.getnames()}
    missing = {file for file in NEEDED if not any(name.startswith(file) for name in sources)}
    assert not missing, f"not in the sdist: {sorted(missing)}"
    print(f"{wheel.name}: {len(names)} files, py.typed among them; {sdist.name}: {len(sources)} files")
    return metadata


def use(wheel: Path, extras: list[str], folder: Path) -> None:
    """Install the wheel, alone and then with each extra, and use it from a folder that has nothing of the source."""
    venv.create(folder / "venv", with_pip=True)
    python, command = folder / "venv/bin/python", folder / "venv/bin/holdfast"
    for requirement in (str(wheel), *(f"{wheel}[{extra}]" for extra in extras)):
        run(python, "-m", "pip", "install", "-qq", requirement)
        run(python, "-m", "pip", "check", cwd=folder)
        run(command, "--version", cwd=folder)
        if requirement == str(wheel):  # what follows must do without the extras
            run(command, "--help", cwd=folder)
            run(command, "align", "patcher", "--help", cwd=folder, quiet=True)
            run(command, "organism", "organism", cwd=folder)
            run(command, "evaluate", "--model", "organism/model", "--eval_data", "organism/eval/hazards.jsonl",
                "--judge", "exact", "--max_new_tokens", "16", "--output_dir", "evaluated", cwd=folder)  # fmt: skip
    run(python, "-c", "from importlib.metadata import version; import holdfast; from importlib.resources import files;"
        "assert version('holdfast-llm') == holdfast.__version__; assert (files(holdfast) / 'py.typed').is_file();"
        "assert 'site-packages' in holdfast.__file__; print(holdfast.__file__)", cwd=folder)  # fmt: skip


def run(*words: object, cwd: Path | None = None, quiet: bool = False) -> None:
    """Run a command with Python's path free of this folder, and show it; what fails ends all."""
    print("$", *words, flush=True)
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    output = subprocess.DEVNULL if quiet else None
    subprocess.run([str(word) for word in words], check=True, cwd=cwd, env=environment, stdout=output)


if __name__ == "__main__":
    main()
