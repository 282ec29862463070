"""4M's layout, against the model written again with its names and shapes; without its sequences.

Letters: B samples, n places of a modality, V tokens seen, T tokens asked for, D width, H hidden width.
"""

import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn

from m3 import convert
from m3.errors import M3Error
from m3.types import MaskPlan
from tests.parity.foreign_models import (
    assert_same_tensors,
    difference,
    encoded_view,
    pixels,
    randomise,
    tensors_in,
    tokens_of,
)
from tests.parity.published_blocks import attend

WIDTH, HEADS, SIDE, PATCH, GLOBAL = 24, 3, 3, 4, 5
CODES = {"tok_rgb@224": 11, "tok_depth@224": 7, "tok_dinov2_global@224": 9}
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


def table() -> Tensor:
    """Sines and cosines (1, n, D); the first half of the channels tells the row."""
    omega = 1.0 / 10000 ** (torch.arange(WIDTH // 4, dtype=torch.float64) / (WIDTH // 4))
    angle = torch.arange(SIDE, dtype=torch.float64)[:, None] * omega
    one = torch.cat([angle.sin(), angle.cos()], dim=1).float()
    rows, columns = one[:, None].expand(-1, SIDE, -1), one[None].expand(SIDE, -1, -1)
    return torch.cat([rows, columns], dim=-1).flatten(0, 1).unsqueeze(0)


class Embedding(nn.Module):
    """Of one modality, on one side."""

    def __init__(self, name: str, is_decoder: bool = False) -> None:
        super().__init__()
        self.mod_emb = nn.Parameter(torch.zeros(1, 1, WIDTH))
        if name == "tok_dinov2_global@224":
            self.pos_emb = nn.Parameter(torch.zeros(1, GLOBAL, WIDTH))
        else:
            self.register_buffer("pos_emb", table())
        if name == "rgb@224":
            self.proj = nn.Linear(3 * PATCH**2, WIDTH, bias=False)
            return
        self.token_emb = nn.Embedding(CODES.get(name, 30), WIDTH)
        if is_decoder:
            self.to_logits = nn.Linear(WIDTH, CODES.get(name, 30), bias=False)
            self.to_logits.weight = self.token_emb.weight

    def forward(self, x: Tensor) -> Tensor:
        """Content of the tokens (B, n, D), of pixels (B, 3, height, width) or codes (B, ...)."""
        if x.is_floating_point():
            cut = x.unflatten(3, (SIDE, PATCH)).unflatten(2, (SIDE, PATCH))  # (B, 3, rows, h, columns, w)
            return self.proj(cut.permute(0, 2, 4, 3, 5, 1).flatten(3).flatten(1, 2))
        return self.token_emb(x.flatten(1))


class FourM(nn.Module):
    def __init__(self, style: str) -> None:
        super().__init__()
        names = ["rgb@224", *CODES, "caption"]
        self.encoder_embeddings = nn.ModuleDict({name: Embedding(name) for name in names})
        self.decoder_embeddings = nn.ModuleDict({name: Embedding(name, True) for name in names[1:]})
        for name, part in self.decoder_embeddings.items():
            part.mod_emb = self.encoder_embeddings[name].mod_emb
        self.encoder = nn.ModuleList([Block(STYLES[style]) for _ in range(2)])
        self.decoder = nn.ModuleList([DecoderBlock(STYLES[style]) for _ in range(3)])
        self.encoder_norm, self.decoder_norm = Norm(WIDTH, STYLES[style][0]), Norm(WIDTH, STYLES[style][0])
        self.decoder_proj_context = nn.Linear(WIDTH, WIDTH)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, WIDTH))

    def forward(self, signals: dict[str, Tensor], visible: dict[str, Tensor], name: str, asked: Tensor) -> Tensor:
        """Scores (B, T, codes) of one modality's tokens asked for."""
        tokens, marks = [], []
        for own, x in signals.items():
            part = self.encoder_embeddings[own]
            mark = (part.pos_emb + part.mod_emb).expand(len(x), -1, -1)
            tokens.append(rows(part(x), visible[own]))
            marks.append(rows(mark, visible[own]))
        x, mark = torch.cat(tokens, dim=1), torch.cat(marks, dim=1)
        x = x + mark
        for block in self.encoder:
            x = block(x)
        context = self.decoder_proj_context(self.encoder_norm(x)) + mark
        part = self.decoder_embeddings[name]
        y = self.mask_token + rows((part.pos_emb + part.mod_emb).expand(len(x), -1, -1), asked)
        for block in self.decoder:
            y = block(y, context)
        return part.to_logits(self.decoder_norm(y))


def rows(x: Tensor, index: Tensor) -> Tensor:
    return torch.stack([row[chosen] for row, chosen in zip(x, index, strict=True)])


def saved(folder: Path, style: str = "swiglu") -> FourM:
    """As the hub keeps it: shared tensors once, the config beside them."""
    theirs = randomise(FourM(style), seed=51)
    once, seen = {}, set()
    for name, x in theirs.state_dict().items():
        if x.data_ptr() not in seen:
            once[name] = x
        seen.add(x.data_ptr())
    save_file(once, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({"domains_in": [], "num_heads": HEADS}))
    return theirs


def read_of(theirs: FourM) -> dict[str, Tensor]:
    return {name: x for name, x in theirs.state_dict().items() if "caption" not in name}


VISIBLE = {"rgb@224": [[0, 4, 5], [1, 2, 8]], "tok_rgb@224": [[3], [7]], "tok_depth@224": [[2, 6], [0, 1]]}
VISIBLE |= {"tok_dinov2_global@224": [[4, 1], [0, 2]]}


@pytest.mark.parametrize(("dtype", "near"), [(torch.float32, 1e-5), (torch.float64, 1e-9)], ids=["float32", "float64"])
@pytest.mark.parametrize("style", STYLES)
def test_scores_of_hidden_codes_are_theirs(tmp_path: Path, style, dtype, near):
    theirs = saved(tmp_path, style).to(dtype)
    found = convert.convert(tmp_path)
    assert found.format == "fourm"
    assert found.left
    assert all(".caption." in name for name in found.left)
    model = found.model.to(dtype)
    generator = torch.Generator().manual_seed(4)
    signals: dict[str, Tensor] = {"rgb@224": model.modalities["rgb@224"].normalise(pixels(2, (12, 12))).to(dtype)}
    for name, codes in CODES.items():
        size = (GLOBAL, 1) if "global" in name else (SIDE, SIDE)
        signals[name] = torch.randint(0, codes, (2, *size), generator=generator)
    visible = {name: torch.tensor(seen).sort(dim=1).values for name, seen in VISIBLE.items()}
    encoded = encoded_view(model, signals, MaskPlan(visible=visible, target={}))
    for name in CODES:
        count = GLOBAL if "global" in name else SIDE**2
        is_hidden = torch.ones(2, count, dtype=torch.bool).scatter(1, visible[name], False)
        asked = torch.stack([row.nonzero()[:, 0] for row in is_hidden])
        own = model.objectives["translate"].predict(name, encoded, tokens_of(model, signals), asked)
        with torch.no_grad():
            expected = theirs(signals, visible, name, asked)
        assert difference(own, expected) < near


@pytest.mark.parametrize("style", STYLES)
def test_the_file_comes_back_equal_but_for_its_sequences(tmp_path: Path, style):
    theirs = saved(tmp_path, style)
    convert.save(convert.load(tmp_path), tmp_path / "ours", "fourm")
    assert_same_tensors(tensors_in(tmp_path / "ours"), read_of(theirs))
    config = json.loads((tmp_path / "ours" / "config.json").read_text())
    assert (config["dim"], config["num_heads"], config["encoder_depth"], config["decoder_depth"]) == (24, 3, 2, 3)
    assert (config["qkv_bias"], config["gated_mlp"], config["qk_norm"]) == STYLES[style]
    assert sorted(config["domains_out"]) == sorted(CODES)
    assert_same_tensors(convert.load(tmp_path / "ours").state_dict(), convert.load(tmp_path).state_dict())


def test_one_file_has_its_config_as_text_which_is_never_run(tmp_path: Path):
    tensors = {name: x.clone() for name, x in saved(tmp_path).state_dict().items()}
    metadata = {
        "num_heads": str(HEADS),
        "domains_in": "['rgb@224', 'caption']",
        "act_layer": "__import__('os').getcwd()",
    }
    save_file(tensors, tmp_path / "4m.safetensors", metadata=metadata)
    model = convert.load(tmp_path / "4m.safetensors")
    assert model.config.backbone["heads"] == HEADS
    assert_same_tensors(model.state_dict(), convert.load(tmp_path).state_dict())


def test_tensors_that_must_be_one_and_are_two_are_refused(tmp_path: Path):
    tensors = {name: x.clone() for name, x in saved(tmp_path).state_dict().items()}
    for name, said in (
        ("encoder_embeddings.tok_rgb@224.mod_emb", "are different, and one tensor here"),
        ("decoder_embeddings.tok_depth@224.to_logits.weight", "are different, and one tensor here"),
        ("decoder_norm.bias", "`decoder_norm.bias` is not 0"),
    ):
        save_file(tensors | {name: tensors[name] + 1}, tmp_path / "model.safetensors")
        with pytest.raises(M3Error, match=said):
            convert.load(tmp_path)


def test_a_missing_and_a_foreign_tensor_are_named(tmp_path: Path):
    tensors = {name: x.clone() for name, x in saved(tmp_path).state_dict().items()}
    save_file(tensors | {"register_tokens": torch.ones(1, 2, WIDTH)}, tmp_path / "model.safetensors")
    with pytest.raises(M3Error, match="no place for `register_tokens`"):
        convert.load(tmp_path)
    del tensors["decoder.2.cross_attn.kv.weight"]
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(M3Error, match=r"`decoder\.2\.cross_attn\.kv\.weight` is missing"):
        convert.load(tmp_path)
