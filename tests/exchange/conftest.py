import logging
import threading

import pytest
import safetensors.torch
import torch

from holdfast.exchange import Exchange

FINGERPRINT = {"model": "a", "tokenizer": "b", "trained parameters": "c"}


@pytest.fixture
def weights():
    """Values of every kind: what rounding, or a comparison of numbers, would hide."""
    odd = torch.tensor([0.0, -0.0, float("nan"), float("inf"), 1e-40, 3.1415927, -2.5e38])
    return {"layer.weight": torch.randn(5, 3), "layer.bias": odd, "scale": torch.tensor(0.3), "none": torch.zeros(0, 2)}


@pytest.fixture
def join(tmp_path):
    """Opens the exchange as a defender (by default) or joins it as an attacker; closes what is left open."""
    opened = []

    def join(origin="defender", **changes):
        run = "runs/one" if origin == "defender" else None
        settings = {"origin": origin, "run": run, "fingerprint": FINGERPRINT, **changes}
        opened.append(Exchange(tmp_path / "exchange", **settings))
        return opened[-1]

    yield join
    for exchange in opened:
        exchange.close()


@pytest.fixture
def defender(join):
    return join()


@pytest.fixture
def attacker(join, defender):
    return join("attacker")


@pytest.fixture
def held(monkeypatch):
    """An event; until it is set, nothing is written."""
    event, save = threading.Event(), safetensors.torch.save

    def waiting(*args, **kwargs):
        assert event.wait(30)
        return save(*args, **kwargs)

    monkeypatch.setattr(safetensors.torch, "save", waiting)
    yield event
    event.set()


@pytest.fixture
def warnings(caplog):
    """The warnings so far, as text."""
    caplog.set_level(logging.WARNING)
    return lambda: [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
