"""One token per region: its values, and its box as the position.

Letters: B batch, N regions, F values of a region, D width.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from m3.errors import M3Error
from m3.linear import Linear
from m3.plugins import Signal, Strict, Tokenizer
from m3.types import Tokens

EPS = 1e-12
"""Of the norm, as in BERT."""


class Region(Tokenizer):
    """A linear layer and a norm of the values (Chen et al. 2020, UNITER, section 3.1).

    Positions are UNITER's seven numbers: left, top, right, bottom, width, height, area, as shares of the picture;
    `positions: {type: projected}` embeds them as the paper does, by a linear layer and a norm.
    """

    class Spec(Strict):
        """Settings of `type: region`.

        Attributes:
            mask_values: hidden regions are learned values, which are projected as those of others are (UNITER's code);
                else a learned vector stands in for what is projected.
        """

        mask_values: bool = False

    axes = 7

    def __init__(self, spec: Spec, signal: Signal, width: int) -> None:
        super().__init__(spec, signal, width)
        if not signal.is_boxed:
            raise M3Error("tokenizer `region` reads values with boxes; use it for `regions` or `region_labels`.")
        self.positions = {"type": "projected"}
        self.value_width = self.output_width = signal.channels - 4
        self.projection = Linear(self.value_width, width)
        self.norm = nn.LayerNorm(width, eps=EPS)
        if spec.mask_values:
            self.mask_values = nn.Parameter(torch.empty(1, self.value_width))

    def tokenize(self, signal: Tensor, times: Tensor | None = None) -> Tokens:
        """Read (B, N, F + 4), NaN where there is no region -> values (B, N, F), positions (B, N, 7)."""
        box = signal[..., -4:].nan_to_num(0.0)
        size = box[..., 2:] - box[..., :2]
        places = torch.cat([box, size, size.prod(-1, keepdim=True)], dim=-1)
        return Tokens(signal[..., :-4], places, ~signal.isnan().any(-1))

    def embed(self, values: Tensor) -> Tensor:
        """Project (B, S, F) to (B, S, D)."""
        return self.norm(self.projection(values.nan_to_num(0.0)))

    def detokenize(self, values: Tensor, positions: Tensor, size: tuple[int, ...]) -> Tensor:
        """Put values (B, N, F) and boxes together to (B, N, F + 4)."""
        return torch.cat([values, positions[..., :4].expand(len(values), -1, -1).to(values.dtype)], dim=-1)

    def decode(self, output: Tensor) -> Tensor:
        """Return the prediction itself: a head predicts the values."""
        return output

    def tied_weight(self) -> Tensor:
        """Return the projection's transpose (F, D)."""
        return self.projection.weight.t()
