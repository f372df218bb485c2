"""Run every command of a page and put its output in place of what stood there.

    python docs/examples/refresh.py docs/quickstart.md

Commands are the lines that start with `$ ` inside ```console blocks; they run in order, in one new folder, in the
environment of the Python that runs this. What a command prints follows it in the block; the folder's name is left out.
"""

import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

BLOCK = re.compile(r"```console\n(.*?)```", re.DOTALL)
ROOT = Path(__file__).resolve().parents[2]


def run_block(block: re.Match[str], folder: Path) -> str:
    """The block with fresh output."""
    commands = re.findall(r"^\$ ((?:.*\\\n)*.*)$", block.group(1), flags=re.MULTILINE)
    shown = []
    for command in commands:
        print(f"$ {command}", flush=True)
        environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "COLUMNS": "110"}
        done = subprocess.run(
            command, shell=True, cwd=folder, env=environment, capture_output=True, text=True, check=False
        )
        output = "".join(line.rstrip() + "\n" for line in (done.stderr + done.stdout).splitlines() if line.strip())
        if done.returncode != 0:
            output += f"(exit code {done.returncode})\n"
        print(output, flush=True)
        shown.append(f"$ {command}\n{output}")
    return "```console\n" + "\n".join(shown) + "```"


def main(page: Path) -> None:
    """Refresh one page."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "docs").symlink_to(ROOT / "docs")
        (folder / "recipes").symlink_to(ROOT / "recipes")
        text = page.read_text(encoding="utf-8")
        page.write_text(BLOCK.sub(lambda block: run_block(block, folder), text), encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
