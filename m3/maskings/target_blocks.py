"""I-JEPA's masks: several target blocks in an image and a context without them.

Letters: B batch, N tokens, V visible tokens, K target blocks, T tokens of a block.
"""

from __future__ import annotations

import math
from typing import Annotated

import torch
from pydantic import Field, PositiveFloat, PositiveInt, model_validator
from torch import Tensor

from m3.errors import M3Error
from m3.masking import Amount, Selection, amount
from m3.plugins import Strict
from m3.random import Draws
from m3.shaped_scorers import rectangles
from m3.types import MaskPlan, Tokens, take

Share = Annotated[float, Field(gt=0, le=1)]


class TargetBlocks(Selection):
    """K blocks to be predicted, each by itself, from what is left of a large block (Assran et al. 2023, section 3).

    Every target block has exactly T tokens: a rectangle of a random aspect, whose last column is cut where it has more.
    The context has exactly V tokens: those of the context block that are in no target block; where there are more of
    them, the ones that lie furthest in a random direction are left out, where there are fewer, others outside the
    context block join. V may be at most N - K T, so that no target token is ever seen.

    The original draws one size for all samples of a batch and cuts all contexts to the shortest of the batch; here
    nothing depends on other samples.
    """

    class Spec(Strict):
        """Settings of `type: target_blocks`.

        Attributes:
            visible: V, share or number of tokens of the context.
            blocks: K.
            size: T, share or number of tokens of a target block.
            aspect: smallest and largest ratio of height to width of a target block, drawn evenly.
            context: smallest and largest share of the context block, a square, drawn evenly.
        """

        visible: Amount
        blocks: PositiveInt = 4
        size: Amount = 0.175
        aspect: tuple[PositiveFloat, PositiveFloat] = (0.75, 1.5)
        context: tuple[Share, Share] = (0.85, 1.0)

        @model_validator(mode="after")
        def _in_order(self) -> TargetBlocks.Spec:
            for name in ("aspect", "context"):
                low, high = getattr(self, name)
                if low > high:
                    raise ValueError(f"`{name}` is smallest, then largest: write [{high}, {low}]")
            return self

    def __init__(self, spec: Spec) -> None:
        self.spec = spec

    def check(self, names: tuple[str, ...]) -> None:
        """Raise M3Error for a view of several modalities."""
        if len(names) != 1:
            raise M3Error(f"masking `target_blocks` is for one modality, got {', '.join(names)}; use `fixed`.")

    def __call__(self, tokens: dict[str, Tokens], draws: Draws) -> MaskPlan:
        """Select; the targets of a sample are its blocks one behind the other, and may overlap."""
        ((name, part),) = tokens.items()
        visible, size = amount(self.spec.visible, part.count), amount(self.spec.size, part.count)
        if visible + self.spec.blocks * size > part.count:
            raise M3Error(
                f"masking: {visible} visible tokens and {self.spec.blocks} target blocks of {size} are more than the "
                f"{part.count} of `{name}`; lower `visible` or `size`."
            )
        is_target = self._targets(part, size, draws)  # (B, K, N)
        target = (~is_target).to(torch.uint8).argsort(dim=-1, stable=True)[..., :size].flatten(1)
        score = self._context(part, draws) + 2 * is_target.any(1)
        seen = score.argsort(dim=-1, stable=True)[:, :visible].sort(-1).values
        if part.is_valid is None:
            return MaskPlan({name: seen}, {name: target}, blocks={name: self.spec.blocks})
        there = {name: take(part.is_valid, target)}
        return MaskPlan(
            {name: seen}, {name: target}, there, is_valid=take(part.is_valid, seen), blocks={name: self.spec.blocks}
        )

    def _targets(self, part: Tokens, size: int, draws: Draws) -> Tensor:
        """Return (B, K, N) bool, True for the T tokens of each block."""
        lot, top, left = draws.uniform("target blocks", 3 * self.spec.blocks).chunk(3, dim=1)
        low, high = self.spec.aspect
        area = torch.full_like(lot, size)
        order = rectangles(part.positions, area, low + lot * (high - low), top, left)
        return order.argsort(dim=-1, stable=True).argsort(-1) < size

    def _context(self, part: Tokens, draws: Draws) -> Tensor:
        """Return (B, N): below 1 in the context block, lowest on one side of it; from 1 to 2 outside."""
        lot, top, left, direction = draws.uniform("context block", 4).chunk(4, dim=1)
        low, high = self.spec.context
        area = ((low + lot * (high - low)) * part.count).floor()
        is_outside = ~rectangles(part.positions, area, torch.ones_like(area), top, left).squeeze(1).isfinite()
        y, x = part.positions[..., -2], part.positions[..., -1]
        angle = 2 * math.pi * direction
        far = angle.cos() * (y - y.mean(-1, keepdim=True)) + angle.sin() * (x - x.mean(-1, keepdim=True))
        return far / (4 * far.abs().amax(-1, keepdim=True).clamp(min=1)) + 0.5 + is_outside
