"""Leases: a reader's word to a writer that a version is being read, good until a stated time."""

from __future__ import annotations

import json
import logging
import os
import platform
import time
from pathlib import Path
from uuid import uuid4

from holdfast.files import write_json

logger = logging.getLogger(__name__)

LEASES = "leases"


class Leases:
    """The leases that one job holds in an exchange: at most one for each origin it reads from.

    Args:
        folder: The exchange.
        holder: Whose leases they are, for people to read.
        seconds: How long a lease is good for.
    """

    def __init__(self, folder: Path, holder: str, seconds: float) -> None:
        self._folder = folder / LEASES
        self._holder = f"{holder}, process {os.getpid()} on {platform.node()}"
        self._seconds = seconds
        self._held: dict[str, Path] = {}

    def take(self, origin: str, version: str) -> None:
        """Keep a version (its folder, relative to the exchange) from being deleted, in place of the one before.

        Where nothing can be written, it is read without a lease: should it vanish meanwhile, loading finds out.
        """
        self.release(origin)
        path = self._folder / f"{uuid4().hex}.json"
        try:
            write_json(path, {"version": version, "expires": time.time() + self._seconds, "holder": self._holder})
        except OSError as error:
            logger.warning("no lease can be taken in %s (%s); versions are read without", self._folder, error.strerror)
        else:
            self._held[origin] = path

    def release(self, origin: str) -> None:
        """Give up the lease on a version of this origin, if there is one."""
        if origin in self._held:
            _delete(self._held.pop(origin))

    def release_all(self) -> None:
        """Give up every lease."""
        for origin in list(self._held):
            self.release(origin)


def leased_versions(folder: Path) -> set[str]:
    """The versions under a live lease, anyone's, relative to the exchange; leases that have expired are deleted."""
    live = set()
    for path in (folder / LEASES).glob("*.json"):
        try:
            lease = json.loads(path.read_bytes())
            if lease["expires"] > time.time():
                live.add(lease["version"])
            else:
                _delete(path)
        except (OSError, ValueError, TypeError, KeyError):
            continue  # released meanwhile, or not a lease
    return live


def _delete(path: Path) -> None:
    try:
        path.unlink(missing_ok=True)
    except OSError as error:
        logger.warning("lease %s cannot be deleted (%s); it expires by itself", path, error.strerror)
