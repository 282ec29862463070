"""Linear classification by stochastic gradients, the protocol of published linear probes (He et al. 2022, A.1).

Letters: n samples, F features, K classes.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from m3.errors import M3Error


def train_linear(
    features: dict[str, np.ndarray],
    labels: np.ndarray,
    optimizer: str,
    rate: float,
    epochs: int,
    batch_size: int,
    seed: int,
) -> np.ndarray:
    """Train BatchNorm without scale and shift and a linear layer on cached features; return the guesses (m,).

    Learning rate: linear warm-up over a tenth of the steps, then half a cosine to 0; no weight decay. The last batch of
    an epoch may be smaller.

    Args:
        features: `train` (n, F) and `held_out` (m, F) float32.
        labels: (n,) int64 of the training samples.
        optimizer: `lars`, `sgd` (momentum 0.9) or `adamw`.
        rate: highest learning rate, for a batch of 256.
        epochs: passes over the training samples.
        batch_size: samples of a step.
        seed: of the order of the samples.
    """
    train, others = (torch.from_numpy(np.ascontiguousarray(features[split])) for split in ("train", "held_out"))
    truth = torch.from_numpy(labels)
    generator = torch.Generator().manual_seed(seed)
    head = nn.Sequential(
        nn.BatchNorm1d(train.shape[1], affine=False, eps=1e-6), _linear(train.shape[1], truth, generator)
    )
    steps_per_epoch = math.ceil(len(train) / batch_size)
    steps, warmup = epochs * steps_per_epoch, max(1, epochs * steps_per_epoch // 10)
    order = torch.arange(len(train))
    descent = _optimizer(optimizer, list(head.parameters()))
    for step in range(steps):
        turn = step % steps_per_epoch
        if turn == 0:
            order = torch.randperm(len(train), generator=generator)
        chosen = order[turn * batch_size : (turn + 1) * batch_size]
        if len(chosen) < 2:  # BatchNorm knows no variance of one sample
            continue
        curve = step / warmup if step < warmup else 0.5 * (1 + math.cos(math.pi * (step - warmup) / (steps - warmup)))
        for group in descent.param_groups:
            group["lr"] = rate * batch_size / 256 * curve
        loss = F.cross_entropy(head(train[chosen]), truth[chosen])
        descent.zero_grad()
        loss.backward()
        descent.step()
    head.eval()
    with torch.no_grad():
        return head(others).argmax(1).numpy()


def _linear(width: int, labels: torch.Tensor, generator: torch.Generator) -> nn.Linear:
    # Draws nothing of the generator that training goes on with.
    layer: Any = nn.utils.skip_init(nn.Linear, width, int(labels.max()) + 1)
    with torch.no_grad():
        layer.weight.normal_(std=0.01, generator=generator)
        layer.bias.zero_()
    return layer


def _optimizer(name: str, parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    if name == "sgd":
        return torch.optim.SGD(parameters, lr=0.0, momentum=0.9)
    if name == "adamw":
        return torch.optim.AdamW(parameters, lr=0.0, weight_decay=0.0)
    try:
        from timm.optim.lars import Lars
    except ImportError as error:
        raise M3Error("`optimizer: lars` needs timm: pip install timm, or use `sgd` or `adamw`.") from error
    return Lars(parameters, lr=1.0, momentum=0.9, weight_decay=0.0)  # type: ignore[arg-type]  # floats, its hints say int
