"""Tensors that are cut up over processes (FSDP2), in memory and on disk.

On disk each process writes its own parts, and any number of processes reads them. It is the safetensors format of
torch.distributed.checkpoint: every file says which part of which tensor it holds, so nothing is unpickled, other
processes can cut the tensors differently, and one alone can put them together.
"""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import TYPE_CHECKING, TypeGuard

import torch
from torch import Tensor

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor

FOLDER = "shards"
"""Where in a checkpoint the parts lie, one file per process."""


def is_cut(tensor: Tensor) -> TypeGuard[DTensor]:
    """Return True for a tensor of which this process holds only a part."""
    from torch.distributed.tensor import DTensor  # over half a second to import

    return isinstance(tensor, DTensor)


def whole(tensor: Tensor) -> Tensor:
    """Return all of a tensor that may be cut up over the processes; all of them must call it then."""
    return tensor.full_tensor() if is_cut(tensor) else tensor


def own_part(tensor: Tensor) -> Tensor:
    """Return what this process holds of a tensor, in the same memory."""
    return tensor.to_local() if is_cut(tensor) else tensor


@torch.no_grad()
def fill(tensor: Tensor, value: Tensor) -> None:
    """Copy a whole tensor into one that may be cut up; nothing is sent."""
    if is_cut(tensor):
        from torch.distributed.tensor import distribute_tensor

        mesh, placements = tensor.device_mesh, tensor.placements
        value = distribute_tensor(value.to(tensor.device), mesh, placements, src_data_rank=None).to_local()
    own_part(tensor).copy_(value)


def write(folder: Path, tensors: dict[str, Tensor]) -> None:
    """Write this process's parts, and its share of the tensors that all hold; every process must call it.

    Raises:
        OSError: a process could not write; all of them raise it.
    """
    from torch.distributed.checkpoint.api import CheckpointException
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageWriter
    from torch.distributed.checkpoint.state_dict_saver import save

    try:
        save(tensors, storage_writer=HuggingFaceStorageWriter(str(folder), save_distributed=True))
    except CheckpointException as error:  # not an Exception, and a page long
        rank, (cause, _) = next(iter(error.failures.items()))
        raise OSError(f"{cause} (in process {rank})") from error


def read(folder: Path, tensors: dict[str, Tensor]) -> None:
    """Fill tensors, whole or cut up in any way, with what was written under their names; nothing is sent.

    Raises:
        OSError: it can't be read.
    """
    from torch.distributed.checkpoint.api import CheckpointException
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader
    from torch.distributed.checkpoint.state_dict_loader import load

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        try:
            load(tensors, storage_reader=HuggingFaceStorageReader(str(folder)), no_dist=True)
        except CheckpointException as error:
            raise OSError(str(next(iter(error.failures.values()))[0])) from error


def shapes(folder: Path) -> dict[str, torch.Size]:
    """Return name -> shape of the whole tensor, of all that were written."""
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader
    from torch.distributed.checkpoint.metadata import TensorStorageMetadata

    written = HuggingFaceStorageReader(str(folder)).read_metadata().state_dict_metadata
    return {name: tensor.size for name, tensor in written.items() if isinstance(tensor, TensorStorageMetadata)}
