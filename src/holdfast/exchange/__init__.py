"""The folder through which Patcher's defender and its attackers, jobs of their own, hand each other weights."""

from holdfast.exchange.exchange import DEFENDER, Exchange, ExchangeError
from holdfast.exchange.fingerprint import fingerprint_of
from holdfast.exchange.opening import is_finished, opened_with, run_of
from holdfast.exchange.versions import Version

__all__ = ["DEFENDER", "Exchange", "ExchangeError", "Version", "fingerprint_of", "is_finished", "opened_with", "run_of"]
