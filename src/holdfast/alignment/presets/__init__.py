"""Patcher's settings that were searched for (docs/strongest.md) and have a name: recipes, each in a file of its own.

They say how a model is defended, and leave open what hangs on the model and its data: rows, updates, learning rate.
"""

from __future__ import annotations

from pathlib import Path
from types import MappingProxyType

PRESETS = MappingProxyType({path.stem: path for path in sorted(Path(__file__).parent.glob("*.yaml"))})
"""The file of every preset, by its name."""
NEEDS = MappingProxyType({"strong": ("attack_data", "benign_data", "retain_data", "refusal")})
"""The flags without which a part of a preset would play no part."""
