"""How a version's tensors get into its files and out of them: `torch.distributed.checkpoint`, in safetensors form."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path

import torch
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions
from torch.distributed.checkpoint.storage import WriteResult

from holdfast.exchange.versions import BadVersionError, read_manifest

# That there is no process group is no news to a single process.
warnings.filterwarnings("ignore", message="torch.distributed is disabled", category=UserWarning)


class Writer(HuggingFaceStorageWriter):
    """Writes one safetensors file a rank, and no index that would have to be unpickled.

    Args:
        folder: Where to; it is made.
        finish: Called on rank 0 with the names of all files when all ranks have written theirs. What it raises fails
            the save on every rank.
    """

    def __init__(self, folder: Path, finish: Callable[[set[str]], None]) -> None:
        super().__init__(str(folder), save_distributed=True)
        self.per_thread_copy_ahead = 0  # what is written is on the CPU already
        self._finish = finish

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        """Called by DCP, in the background, in place of writing an index of its own."""
        self._finish({result.storage_data.relative_path for of_rank in results for result in of_rank})


class Reader(HuggingFaceStorageReader):
    """Reads a version from exactly the files that its manifest lists.

    DCP's own takes those that it finds, and leaves what they do not hold unset.

    Raises:
        Exception: A file cannot be read (of whichever kind its parser raises), is missing or one too many.
    """

    def __init__(self, folder: Path) -> None:
        super().__init__(str(folder))
        # Read here and not when DCP asks, which would log a traceback if it failed.
        self._metadata: Metadata = super().read_metadata()
        found = {Path(stored.relative_path).name for stored in self._metadata.storage_data.values()}
        if found != read_manifest(folder)["files"].keys():
            raise BadVersionError("files have vanished from it")

    def read_metadata(self) -> Metadata:
        """Called by DCP."""
        return self._metadata


def stager() -> DefaultStager:
    """What copies weights to the CPU, into memory (pinned for an accelerator) that it keeps for the next copy."""
    on_accelerator = torch.cuda.is_available()
    return DefaultStager(
        StagingOptions(
            use_pinned_memory=on_accelerator,
            use_shared_memory=False,
            use_async_staging=False,
            use_non_blocking_copy=on_accelerator,
        )
    )
