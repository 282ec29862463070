"""A decoder that reads what the encoder made of the visible tokens: self-attention, cross-attention, MLP.

Letters: B batch, T tokens of the decoder, C tokens of the encoder, D width.
"""

from __future__ import annotations

from torch import Tensor, nn

from m3.attention import CrossAttention, SelfAttention
from m3.backbone import BackboneSpec, Scale, feed_forward
from m3.layer import Layer, recomputable


class DecoderBlock(Layer):
    """Pre-norm block: x + self-attention, then x + attention to the context, then x + mlp."""

    def __init__(self, spec: BackboneSpec) -> None:
        super().__init__()
        width, eps, style = spec.width, spec.norm_eps, spec.style
        qk_eps = eps if style.qk_norm else None

        def norm() -> nn.LayerNorm:
            return nn.LayerNorm(width, eps=eps, bias=style.bias)

        def scale() -> nn.Module:
            return nn.Identity() if style.layer_scale is None else Scale(width, style.layer_scale)

        self.norm1 = norm()
        self.self_attention = SelfAttention(width, spec.heads, style.bias, qk_eps)
        self.query_norm, self.context_norm = norm(), norm()
        self.cross_attention = CrossAttention(width, spec.heads, style.bias, qk_eps)
        self.norm2 = norm()
        self.mlp = feed_forward(width, spec.mlp_ratio, style)
        self.scale1, self.scale2, self.scale3 = scale(), scale(), scale()

    @recomputable
    def forward(self, x: Tensor, context: Tensor, mask: Tensor | None, context_mask: Tensor | None) -> Tensor:
        """Map (B, T, D) to (B, T, D).

        Args:
            x: the decoder's tokens.
            context: (B, C, D).
            mask: (B, 1, 1 or T, T) bool, True where one token attends to another.
            context_mask: (B, 1, 1, C) bool, True for tokens of the context that exist.
        """
        x = x + self.scale1(self.self_attention(self.norm1(x), mask))
        x = x + self.scale2(self.cross_attention(self.query_norm(x), self.context_norm(context), context_mask))
        return x + self.scale3(self.mlp(self.norm2(x)))


class Decoder(nn.Module):
    """Blocks and a final norm."""

    def __init__(self, spec: BackboneSpec, depth: int) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([DecoderBlock(spec) for _ in range(depth)])
        self.norm = nn.LayerNorm(spec.width, eps=spec.norm_eps, bias=spec.bias)

    def forward(self, x: Tensor, context: Tensor, mask: Tensor | None, context_mask: Tensor | None) -> Tensor:
        """Map (B, T, D) to (B, T, D); arguments as those of a block."""
        for block in self.blocks:
            x = block(x, context, mask, context_mask)
        return self.norm(x)
