"""4M written again from its description, with the published names and shapes: maps, sequences, both sides.

Letters: B samples, n places of a modality, V tokens seen, T tokens asked for, L words, D width.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.parity.published_blocks import attend

WIDTH, HEADS, SIDE, PATCH, GLOBAL = 24, 3, 3, 4, 5
CODES = {"tok_rgb@224": 11, "tok_depth@224": 7, "tok_dinov2_global@224": 9}
ENTRIES, FIRST, END = 30, 5, 3
WORDS = ["[PAD]", "[UNK]", "[SOS]", "[EOS]", *(f"[S_{i}]" for i in range(10)), *(f"v0={i}" for i in range(16))]
"""A small vocabulary like 4M's: sentinels at 4 to 13, words from 14 on."""
SEQUENCES = ("caption", "det")
STYLES = {"swiglu": (False, True, False), "normed": (False, True, True), "gelu": (True, False, False)}
"""Name -> whether there are biases, a gate, normed queries and keys."""


class Norm(nn.Module):
    """Without a bias zeros are saved in its place."""

    def __init__(self, width: int, has_bias: bool) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        if has_bias:
            self.bias = nn.Parameter(torch.zeros(width))
        else:
            self.register_buffer("bias", torch.zeros(width))

    def forward(self, x: Tensor) -> Tensor:
        return F.layer_norm(x, x.shape[-1:], self.weight, self.bias, 1e-6)


class Attention(nn.Module):
    """Of a sequence to itself, or `cross` to a context."""

    def __init__(self, style: tuple[bool, bool, bool], cross: bool = False) -> None:
        super().__init__()
        bias, _, is_normed = style
        self.cross = cross
        if cross:
            self.q, self.kv = nn.Linear(WIDTH, WIDTH, bias=bias), nn.Linear(WIDTH, 2 * WIDTH, bias=bias)
        else:
            self.qkv = nn.Linear(WIDTH, 3 * WIDTH, bias=bias)
        self.proj = nn.Linear(WIDTH, WIDTH, bias=bias)
        if is_normed:
            self.q_norm, self.k_norm = Norm(WIDTH // HEADS, bias), Norm(WIDTH // HEADS, bias)

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        q, k, v = (self.q(x), *self.kv(context).chunk(2, -1)) if self.cross else self.qkv(x).chunk(3, -1)
        if hasattr(self, "q_norm"):
            q = self.q_norm(q.unflatten(-1, (HEADS, -1))).flatten(2)
            k = self.k_norm(k.unflatten(-1, (HEADS, -1))).flatten(2)
        return self.proj(attend(q, k, v, HEADS))


class Mlp(nn.Module):
    def __init__(self, bias: bool, is_gated: bool) -> None:
        super().__init__()
        hidden = 8 * WIDTH // 3 if is_gated else 4 * WIDTH
        self.fc1, self.fc2 = nn.Linear(WIDTH, hidden, bias=bias), nn.Linear(hidden, WIDTH, bias=bias)
        if is_gated:
            self.fc3 = nn.Linear(WIDTH, hidden, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        h = self.fc1(x)
        return self.fc2(F.silu(h) * self.fc3(x) if hasattr(self, "fc3") else F.gelu(h))


class Block(nn.Module):
    def __init__(self, style: tuple[bool, bool, bool]) -> None:
        super().__init__()
        self.norm1, self.norm2 = Norm(WIDTH, style[0]), Norm(WIDTH, style[0])
        self.attn, self.mlp = Attention(style), Mlp(*style[:2])

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class DecoderBlock(nn.Module):
    def __init__(self, style: tuple[bool, bool, bool]) -> None:
        super().__init__()
        self.norm1, self.norm2, self.query_norm, self.context_norm = (Norm(WIDTH, style[0]) for _ in range(4))
        self.self_attn, self.cross_attn, self.mlp = Attention(style), Attention(style, cross=True), Mlp(*style[:2])

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        x = x + self.self_attn(self.norm1(x))
        x = x + self.cross_attn(self.query_norm(x), self.context_norm(context))
        return x + self.mlp(self.norm2(x))

    def at(self, x: Tensor, context: Tensor) -> Tensor:
        """Return the state of the last token alone."""
        return self(x, context)[:, -1:]


def table() -> Tensor:
    """Sines and cosines (1, n, D); the first half of the channels tells the row."""
    omega = 1.0 / 10000 ** (torch.arange(WIDTH // 4, dtype=torch.float64) / (WIDTH // 4))
    angle = torch.arange(SIDE, dtype=torch.float64)[:, None] * omega
    one = torch.cat([angle.sin(), angle.cos()], dim=1).float()
    rows, columns = one[:, None].expand(-1, SIDE, -1), one[None].expand(SIDE, -1, -1)
    return torch.cat([rows, columns], dim=-1).flatten(0, 1).unsqueeze(0)


def row() -> Tensor:
    """Sines and cosines (1, 512, D) of a sequence."""
    omega = 1.0 / 10000 ** (torch.arange(WIDTH // 2, dtype=torch.float64) / (WIDTH // 2))
    angle = torch.arange(512, dtype=torch.float64)[:, None] * omega
    return torch.cat([angle.sin(), angle.cos()], dim=1).float().unsqueeze(0)


class Embedding(nn.Module):
    """Of one modality, on one side."""

    def __init__(self, name: str, is_decoder: bool = False, is_tied: bool = True) -> None:
        super().__init__()
        self.mod_emb = nn.Parameter(torch.zeros(1, 1, WIDTH))
        if name == "tok_dinov2_global@224":
            self.pos_emb = nn.Parameter(torch.zeros(1, GLOBAL, WIDTH))
        else:
            self.register_buffer("pos_emb", row() if name in SEQUENCES else table())
        if name == "rgb@224":
            self.proj = nn.Linear(3 * PATCH**2, WIDTH, bias=False)
            return
        self.token_emb = nn.Embedding(CODES.get(name, ENTRIES), WIDTH)
        if is_decoder:
            self.to_logits = nn.Linear(WIDTH, CODES.get(name, ENTRIES), bias=False)
            if is_tied:
                self.to_logits.weight = self.token_emb.weight

    def forward(self, x: Tensor) -> Tensor:
        """Content of the tokens (B, n, D), of pixels (B, 3, height, width) or codes (B, ...)."""
        if x.is_floating_point():
            cut = x.unflatten(3, (SIDE, PATCH)).unflatten(2, (SIDE, PATCH))  # (B, 3, rows, h, columns, w)
            return self.proj(cut.permute(0, 2, 4, 3, 5, 1).flatten(3).flatten(1, 2))
        return self.token_emb(x.flatten(1))


class FourM(nn.Module):
    def __init__(self, style: str, is_tied: bool = True) -> None:
        super().__init__()
        names = ["rgb@224", *CODES, *SEQUENCES]
        self.encoder_embeddings = nn.ModuleDict({name: Embedding(name) for name in names})
        self.decoder_embeddings = nn.ModuleDict({name: Embedding(name, True, is_tied) for name in names[1:]})
        for name, part in self.decoder_embeddings.items():
            part.mod_emb = self.encoder_embeddings[name].mod_emb
        self.encoder = nn.ModuleList([Block(STYLES[style]) for _ in range(2)])
        self.decoder = nn.ModuleList([DecoderBlock(STYLES[style]) for _ in range(3)])
        self.encoder_norm, self.decoder_norm = Norm(WIDTH, STYLES[style][0]), Norm(WIDTH, STYLES[style][0])
        self.decoder_proj_context = nn.Linear(WIDTH, WIDTH)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, WIDTH))

    def context(
        self, signals: dict[str, Tensor], visible: dict[str, Tensor], words: dict[str, Tensor] | None = None
    ) -> Tensor:
        """What the decoder reads (B, V, D), of tokens and of `words` (B, L), sentinels among them."""
        tokens, marks = [], []
        for own, x in signals.items():
            part = self.encoder_embeddings[own]
            mark = (part.pos_emb + part.mod_emb).expand(len(x), -1, -1)
            tokens.append(rows(part(x), visible[own]))
            marks.append(rows(mark, visible[own]))
        for own, ids in (words or {}).items():
            part = self.encoder_embeddings[own]
            tokens.append(part.token_emb(ids))
            marks.append((part.pos_emb[:, : ids.shape[1]] + part.mod_emb).expand(len(ids), -1, -1))
        x, mark = torch.cat(tokens, dim=1), torch.cat(marks, dim=1)
        x = x + mark
        for block in self.encoder:
            x = block(x)
        return self.decoder_proj_context(self.encoder_norm(x)) + mark

    def forward(self, signals: dict[str, Tensor], visible: dict[str, Tensor], name: str, asked: Tensor) -> Tensor:
        """Scores (B, T, codes) of one modality's tokens asked for."""
        x = context = self.context(signals, visible)
        part = self.decoder_embeddings[name]
        y = self.mask_token + rows((part.pos_emb + part.mod_emb).expand(len(x), -1, -1), asked)
        for block in self.decoder:
            y = block(y, context)
        return part.to_logits(self.decoder_norm(y))

    def say(self, context: Tensor, name: str, said: Tensor) -> Tensor:
        """Scores (1, entries) of the word behind `said` (1, L); the last place alone sees all of them."""
        part = self.decoder_embeddings[name]
        states = part.token_emb(said) + part.pos_emb[:, : said.shape[1]] + part.mod_emb
        for block in self.decoder:  # word by word, so that none sees those behind it
            states = torch.cat([block.at(states[:, : i + 1], context) for i in range(states.shape[1])], dim=1)
        return part.to_logits(self.decoder_norm(states[:, -1]))


def hidden_runs(words: list[int], is_hidden: list[bool]) -> tuple[list[int], list[int]]:
    """What the encoder reads and what the decoder says: each hidden run is a sentinel, counted from [S_1]."""
    read, said, count, before = [], [], 0, False
    for word, hidden in zip(words, is_hidden, strict=True):
        if hidden and not before:
            read.append(FIRST + count)
            said.append(FIRST + count)
            count += 1
        (said if hidden else read).append(word)
        before = hidden
    return read, [*said, FIRST + count]


def rows(x: Tensor, index: Tensor) -> Tensor:
    return torch.stack([row[chosen] for row, chosen in zip(x, index, strict=True)])
