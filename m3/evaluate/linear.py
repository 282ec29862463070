"""Linear classification by stochastic gradients, the protocol of published linear probes (He et al. 2022, A.1).

Letters: B batch, n samples, F features, K classes, N tokens of a sample, D width.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from m3.backbone import BackboneSpec
from m3.errors import M3Error
from m3.pooling import AttentionPool


def train_linear(
    features: dict[str, np.ndarray],
    labels: np.ndarray,
    optimizer: str,
    rate: float,
    epochs: int,
    batch_size: int,
    seed: int,
    pool: Attentive | None = None,
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
        pool: a layer before both, that makes vectors of states (n, N D) and is trained with them; None: there is none.
    """
    train, others = (torch.from_numpy(np.ascontiguousarray(features[split])) for split in ("train", "held_out"))
    truth = torch.from_numpy(labels)
    generator = torch.Generator().manual_seed(seed)
    width = pool.width if pool else train.shape[1]
    norm = nn.BatchNorm1d(width, affine=False, eps=1e-6)
    head = nn.Sequential(*([pool] if pool else []), norm, _linear(width, truth, generator))
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


class Attentive(nn.Module):
    """A learned query attends to the states of each sample (Bardes et al. 2024, V-JEPA, attentive probing)."""

    def __init__(self, tower: BackboneSpec, seed: int) -> None:
        super().__init__()
        self.width = tower.width
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.pool = AttentionPool(tower)
            nn.init.normal_(self.pool.query, std=0.02)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Pool states (B, N D), NaN where there is none -> (B, D)."""
        states = x.unflatten(1, (-1, self.width))
        is_valid = ~states[..., 0].isnan()
        return self.pool(states.nan_to_num(0.0), is_valid)


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
