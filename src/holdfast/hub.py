"""Asking the Hugging Face Hub, once and quickly, whether it has what the user named."""

import re
from pathlib import Path
from typing import Literal

from huggingface_hub import HfApi, try_to_load_from_cache
from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError

# What the Hub allows as a repository: one or two names of letters, digits, dots, dashes and underscores.
_REPOSITORY = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
_SECONDS = 10


def is_hub_id(name: str) -> bool:
    """Return whether `name` could be the id of a Hub repository."""
    return _REPOSITORY.fullmatch(name) is not None


def unreachable(repository: str, kind: Literal["model", "dataset"], *, revision: str | None = None) -> str | None:
    """Return why a Hub repository cannot be read, or None if it can.

    The libraries that download try a failing connection again for up to a minute a file. This asks once; without a
    connection, a copy in the local cache is good enough.

    Args:
        repository: The Hub id.
        kind: What it should be.
        revision: A branch, tag or commit that it should have.

    Returns:
        A short reason, or None.
    """
    try:
        if kind == "model":
            HfApi().model_info(repository, revision=revision, timeout=_SECONDS)
        else:
            HfApi().dataset_info(repository, revision=revision, timeout=_SECONDS)
    except Exception as error:  # the HTTP client's exceptions share no base class with the Hub's
        # An answer, if only to say no, settles it; without one the cache decides.
        if getattr(error, "response", None) is None and _is_cached(repository, kind, revision):
            return None
        if isinstance(error, GatedRepoError):
            return how_to_get_access(repository, kind)
        if isinstance(error, RepositoryNotFoundError):
            return "there is none of that name, or it is private and `hf auth login` was not run"
        if isinstance(error, RevisionNotFoundError):
            return f"it has no revision {revision!r}"
        return reason(error)
    return None


def how_to_get_access(repository: str, kind: Literal["model", "dataset"]) -> str:
    """Return how to get at a repository whose owner wants terms accepted first."""
    folder = "datasets/" if kind == "dataset" else ""
    return (
        f"it is gated: accept its terms at https://huggingface.co/{folder}{repository}, then log in with "
        "`hf auth login`, or set HF_TOKEN"
    )


def reason(error: BaseException) -> str:
    """Return an exception's first line, without its final full stop, for use inside a sentence."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[0].strip().rstrip(".")


def _is_cached(repository: str, kind: Literal["model", "dataset"], revision: str | None) -> bool:
    if kind == "model":
        names = ("config.json", "adapter_config.json")
        return any(isinstance(try_to_load_from_cache(repository, name, revision=revision), str) for name in names)
    from datasets import config
    from datasets.naming import camelcase_to_snakecase

    *owner, name = repository.split("/")
    return Path(config.HF_DATASETS_CACHE, "___".join([*owner, camelcase_to_snakecase(name)])).is_dir()
