"""heretic-llm's own search, left as it is, with what every trial makes of the weights saved; run by heretic.py.

    PYTHON -P heretic_driver.py FOLDER [heretic's own flags]  # PYTHON: of an environment that has heretic-llm

Its search ends where it would ask what to do with the result. FOLDER/trial-N.safetensors holds the matrices that trial
N changed, FOLDER/trials.json what heretic thinks of it. Nothing of heretic is copied here.
"""

import json
import sys
from pathlib import Path

import heretic.main
import torch
from heretic.evaluator import Evaluator
from heretic.model import Model
from peft.tuners.lora import LoraLayer
from safetensors.torch import save_file

folder = Path(sys.argv.pop(1))
folder.mkdir(parents=True, exist_ok=True)
trials: list[dict[str, float]] = []
abliterate, get_score = Model.abliterate, Evaluator.get_score


def saved(self, *arguments):
    """Abliterate as heretic does, and save the matrices with their adapter merged."""
    abliterate(self, *arguments)
    with torch.no_grad():
        changed = {
            f"{name.removeprefix('base_model.model.')}.weight": (
                module.base_layer.weight + module.get_delta_weight("default")
            ).contiguous()
            for name, module in self.model.named_modules()
            if isinstance(module, LoraLayer)
        }
    save_file(changed, folder / f"trial-{len(trials) + 1}.safetensors")


def scored(self):
    """Score as heretic does, and note it."""
    score, divergence, refusals = get_score(self)
    trials.append({"kl_divergence": divergence, "refusals": refusals, "prompts": len(self.bad_prompts)})
    return score, divergence, refusals


Model.abliterate, Evaluator.get_score = saved, scored
heretic.main.prompt_select = lambda *_, **__: ""  # to leave
heretic.main.run()
(folder / "trials.json").write_text(json.dumps(trials))
