"""Scorers that shape a mask over a plane or follow what is in a picture; the others stand in `m3.scorers`.

Letters: B batch, N tokens, A position axes, K rectangles.
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from pydantic import Field, PositiveFloat, PositiveInt, model_validator
from torch import Tensor

from m3.errors import M3Error
from m3.plugins import Strict, Tokenizer
from m3.random import Draws
from m3.teachers import TeacherSpec
from m3.types import Tokens


class ColourNoise:
    """Noise of a colour: random masks with a spatial texture of their own (ColorMAE, Hinojosa et al. 2024, section 3).

    White noise goes through a linear filter over the positions of the tokens, G(s) being a Gaussian blur of deviation
    s: red G(coarse), blue 1 - G(fine), green G(fine) - G(coarse), purple 1 - green. Red masks are large patches, blue
    ones evenly spread points, green ones blobs of a middle size. Every token's score has the same variance.
    """

    class Spec(Strict):
        """Settings of `type: colour_noise`.

        Attributes:
            colour: `red`, `green` (the paper's best), `blue` or `purple`.
            fine: deviation of the narrow blur, in tokens.
            coarse: deviation of the wide blur, in tokens.
        """

        colour: Literal["red", "green", "blue", "purple"] = "green"
        fine: PositiveFloat = 0.7
        coarse: PositiveFloat = 2.0

        @model_validator(mode="after")
        def _in_order(self) -> ColourNoise.Spec:
            if self.fine >= self.coarse:
                raise ValueError(f"`fine` ({self.fine}) must be smaller than `coarse` ({self.coarse})")
            return self

    def __init__(self, spec: Spec) -> None:
        self.spec = spec

    def __call__(self, tokens: dict[str, Tokens], draws: Draws) -> dict[str, Tensor]:
        """Return modality -> (B, N) float scores with mean 0 and variance 1."""
        scores = {}
        for name, part in tokens.items():
            white = draws.normal(f"score/{name}", part.count).unsqueeze(-1)
            scores[name] = (self._filter(part.positions) @ white).squeeze(-1)
        return scores

    def _filter(self, positions: Tensor) -> Tensor:
        """Return the filter as a matrix (1 or B, N, N) whose rows have length 1."""
        squared = (positions.unsqueeze(2) - positions.unsqueeze(1)).square().sum(-1)
        fine, coarse = ((squared / (-2 * s * s)).softmax(-1) for s in (self.spec.fine, self.spec.coarse))
        unit = (squared == 0).to(squared.dtype)
        rows = {"red": coarse, "blue": unit - fine, "green": fine - coarse, "purple": unit - fine + coarse}
        return F.normalize(rows[self.spec.colour], dim=-1)


class Blocks:
    """Rectangles over the last two axes of the positions, all along the others (an image's plane, a video's tubes).

    64 rectangles are laid down one after the other, and the budget decides how many of them count: those that it
    covers, the last one cut, column by column, so that it is exact. If all of them are too few, the rest is random.

    Hidden blocks of 16 to 75 patches are BEiT's masks (Bao et al. 2021, algorithm 1; there the number of hidden patches
    varies, and the last block is made as small as what is left). Seen blocks of 3 x 3 are data2vec 2.0's inverse
    blocks (Baevski et al. 2022, section 3.3).
    """

    class Spec(Strict):
        """Settings of `type: blocks`.

        Attributes:
            of: what the rectangles are made of, `hidden` or `seen` tokens.
            area: smallest and largest area of a rectangle in tokens of the plane, drawn evenly.
            aspect: smallest ratio of height to width; the largest is its inverse, its logarithm is drawn evenly.
        """

        of: Literal["hidden", "seen"] = "hidden"
        area: tuple[PositiveInt, PositiveInt] = (16, 75)
        aspect: float = Field(default=0.3, gt=0, le=1)

    COUNT = 64

    def __init__(self, spec: Spec) -> None:
        self.spec = spec

    def __call__(self, tokens: dict[str, Tokens], draws: Draws) -> dict[str, Tensor]:
        """Return modality -> (B, N) float scores; the tokens of the first rectangle are the most extreme."""
        scores = {}
        smallest, largest = self.spec.area
        for name, part in tokens.items():
            area, aspect, top, left = draws.uniform(f"blocks/{name}", 4 * self.COUNT).chunk(4, dim=1)  # (B, K) each
            area = (smallest + area * (largest + 1 - smallest)).floor()
            aspect = self.spec.aspect ** (1 - 2 * aspect)
            order = rectangles(part.positions, area, aspect, top, left)  # (B, K, N)
            share = order / order.isfinite().sum(-1, keepdim=True).clamp(min=1)
            turn = torch.arange(self.COUNT, device=area.device).unsqueeze(-1)
            place = (turn + share).amin(1)
            rest = self.COUNT + draws.uniform(f"score/{name}", part.count)
            place = torch.where(place.isfinite(), place, rest)
            scores[name] = place if self.spec.of == "seen" else -place
        return scores


def rectangles(positions: Tensor, area: Tensor, aspect: Tensor, top: Tensor, left: Tensor) -> Tensor:
    """Lay rectangles over the last two axes of token positions.

    Args:
        positions: (1 or B, N, A).
        area: (B, K) number of tokens that each must hold at least; at most it holds a column more.
        aspect: (B, K) height / width, kept as far as the grid has room.
        top: (B, K) in [0, 1), where between the first and the last possible row it begins.
        left: (B, K) likewise for columns.

    Returns:
        (B, K, N) float: the place of each token in the rectangle, column by column from 0; infinite outside.

    Raises:
        M3Error: positions have one axis only.
    """
    if positions.shape[-1] < 2:
        raise M3Error("blocks are rectangles over two axes of positions; use scorer `span` for sequences.")
    y, x = positions[..., -2].unsqueeze(1), positions[..., -1].unsqueeze(1)  # (1 or B, 1, N)
    rows, columns = (axis.amax(-1).round() + 1 for axis in (y, x))  # (1 or B, 1)
    height = (area * aspect).sqrt().round()
    height = height.maximum((area / columns).ceil()).clamp(min=1).minimum(rows)
    width = (area / height).ceil().minimum(columns)
    top, left = (
        (begin * (room - size + 1)).floor() for begin, room, size in ((top, rows, height), (left, columns, width))
    )
    down, right = y - top.unsqueeze(-1), x - left.unsqueeze(-1)  # (B, K, N)
    height, width = height.unsqueeze(-1), width.unsqueeze(-1)
    is_inside = (down >= -0.5) & (down < height - 0.5) & (right >= -0.5) & (right < width - 0.5)
    return torch.where(is_inside, right * height + down, torch.inf)


class Attention:
    """What a frozen teacher attends to is likelier to be seen: MaskAlign's attentive masks (Xue et al. 2023, 3.2).

    Tokens are drawn without replacement with the attention of the teacher's class token in its last block as weights:
    the largest of log(attention) + Gumbel noise (Kool et al. 2019).
    """

    class Spec(TeacherSpec):
        """Settings of `type: attention`; see `TeacherSpec`."""

    def __init__(self, spec: Spec) -> None:
        self.spec = spec
        self.tokenizers: dict[str, Tokenizer] = {}

    def bind(self, tokenizers: dict[str, Tokenizer]) -> None:
        """Learn how the tokens were cut, to put the pictures together again; called once by the network."""
        self.tokenizers = tokenizers
        if not self.spec.is_gone:
            for tokenizer in tokenizers.values():
                self.spec.channels(tokenizer)

    def __call__(self, tokens: dict[str, Tokens], draws: Draws) -> dict[str, Tensor]:
        """Return modality -> (B, N) float scores."""
        scores = {}
        for name, part in tokens.items():
            tokenizer = self.tokenizers[name]
            attention = self.spec.open(tokenizer).attention(self.spec.pictures(tokenizer, part))
            noise = draws.uniform(f"score/{name}", part.count).clamp(min=2.0**-25)
            scores[name] = (-noise.log()).log() - attention.clamp(min=1e-12).log()
        return scores
