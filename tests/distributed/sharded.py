"""`m3 train` with FSDP2 on CPUs over gloo; run under torchrun. Accelerate itself offers FSDP on GPUs only.

python sharded.py RECIPE [a.b=c ...] [--resume]      the environment is what `accelerate launch` makes of fsdp2.yaml
"""

import sys
from typing import Any

import torch
from accelerate.state import PartialState
from accelerate.utils import DistributedType

from m3.cli import main


def use_gloo(self: PartialState, *_: Any, **__: Any) -> tuple[str, DistributedType]:
    """Say that there are several GPUs, which is all that Accelerate asks for FSDP, but let them talk through gloo."""
    return "gloo", DistributedType.MULTI_GPU


def use_cpu(self: PartialState) -> None:
    self.device = torch.device("cpu")


if __name__ == "__main__":
    PartialState._prepare_backend = use_gloo
    PartialState.set_device = use_cpu
    sys.exit(main(["train", *sys.argv[1:]]))
