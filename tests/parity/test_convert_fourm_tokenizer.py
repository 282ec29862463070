"""4M's tokenizers, against the models written again with their names and shapes.

Letters: B samples, C channels, H, W size, n places, D width, K codes, d their width.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn

from m3 import convert
from m3.errors import M3Error
from m3.network import build_modalities, resolved
from m3.tokenizer_model import M3Tokenizer
from tests.parity.published import assert_equal, difference, randomised, tensors_in
from tests.parity.published_blocks import Block

WIDTH, HEADS, SIDE, CODES, LATENT = 24, 3, 3, 40, 6
KINDS = {"image": (3, 4, None), "depth": (1, 4, None), "semantic": (5, 4, 7), "features": (10, 1, None)}
"""Name of ours -> channels, patch, labels."""


def table() -> Tensor:
    """Sines and cosines (1, D, rows, columns); the first half of the channels tells the row."""
    omega = 1.0 / 10000 ** (torch.arange(WIDTH // 4, dtype=torch.float64) / (WIDTH // 4))
    angle = torch.arange(SIDE, dtype=torch.float64)[:, None] * omega
    one = torch.cat([angle.sin(), angle.cos()], dim=1).float()
    both = torch.cat([one[:, None].expand(-1, SIDE, -1), one[None].expand(SIDE, -1, -1)], dim=-1)
    return both.permute(2, 0, 1).unsqueeze(0).contiguous()


class TanhMlp(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.fc1(x).tanh())


class Side(nn.Module):
    """What encoder and decoder share: positions, blocks, and the MLP behind them."""

    def __init__(self, depth: int, has_mlp: bool) -> None:
        super().__init__()
        self.pos_emb = nn.Parameter(table(), requires_grad=False)
        self.blocks = nn.Sequential(*[Block(WIDTH, HEADS, 4 * WIDTH) for _ in range(depth)])
        if has_mlp:
            self.norm_mlp, self.post_mlp = nn.LayerNorm(WIDTH, eps=1e-6), TanhMlp()

    def through(self, x: Tensor) -> Tensor:
        """(B, D, rows, columns) -> the same."""
        x = self.blocks((x + self.pos_emb).flatten(2).transpose(1, 2))
        if hasattr(self, "post_mlp"):
            x = x + self.post_mlp(self.norm_mlp(x))
        return x.transpose(1, 2).unflatten(2, (SIDE, SIDE))


class Encoder(Side):
    def __init__(self, channels: int, patch: int, has_mlp: bool) -> None:
        super().__init__(2, has_mlp)
        self.proj = nn.Conv2d(channels, WIDTH, patch, stride=patch)


class Decoder(Side):
    def __init__(self, channels: int, patch: int, has_mlp: bool) -> None:
        super().__init__(3, has_mlp)
        self.out_proj = nn.Linear(WIDTH, channels * patch**2)


class Codebook(nn.Module):
    def __init__(self, is_cosine: bool) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(12)
        book = torch.randn(CODES, LATENT, generator=generator)
        length = 0.5 + 0.5 * torch.rand(CODES, 1, generator=generator)  # means of unit vectors are shorter than 1
        self.register_buffer("initted", torch.ones(1))
        self.register_buffer("cluster_size", torch.rand(CODES, generator=generator) * 9)
        self.register_buffer("embed", F.normalize(book, dim=1) * length if is_cosine else book)
        if not is_cosine:
            self.register_buffer("embed_avg", book * 3)


class Quantize(nn.Module):
    def __init__(self, is_cosine: bool) -> None:
        super().__init__()
        self._codebook = Codebook(is_cosine)


class Vqvae(nn.Module):
    def __init__(self, kind: str, has_mlp: bool = True, is_cosine: bool = True, has_decoder: bool = True) -> None:
        super().__init__()
        self.channels, self.patch, self.labels = KINDS[kind]
        if self.labels:
            self.cls_emb = nn.Embedding(self.labels, self.channels)
        self.is_cosine = is_cosine
        self.encoder = Encoder(self.channels, self.patch, has_mlp)
        self.quant_proj = nn.Conv2d(WIDTH, LATENT, 1)
        self.quantize = Quantize(is_cosine)
        if has_decoder:
            self.post_quant_proj = nn.Conv2d(LATENT, WIDTH, 1)
            self.decoder = Decoder(self.labels or self.channels, self.patch, has_mlp)

    def tokens(self, x: Tensor) -> Tensor:
        """Numbers (B, rows, columns) of the nearest codes."""
        if self.labels:
            x = self.cls_emb(x).permute(0, 3, 1, 2)
        z = self.quant_proj(self.encoder.through(self.encoder.proj(x))).permute(0, 2, 3, 1)
        book: Any = self.quantize._codebook.embed
        if self.is_cosine:
            unit = z / z.norm(dim=-1, keepdim=True)
            return (unit @ (book / book.norm(dim=-1, keepdim=True)).t()).argmax(-1)
        return torch.cdist(z, book.expand(len(z), 1, -1, -1)).argmin(-1)

    def decode(self, tokens: Tensor) -> Tensor:
        """Pictures (B, C or labels, H, W) of codes."""
        book: Any = self.quantize._codebook.embed
        x = self.decoder.through(self.post_quant_proj(book[tokens].permute(0, 3, 1, 2)))
        y = self.decoder.out_proj(x.permute(0, 2, 3, 1)).unflatten(-1, (-1, self.patch, self.patch))
        return y.permute(0, 3, 1, 4, 2, 5).flatten(4).flatten(2, 3)


def saved(folder: Path, kind: str, settings: dict | None = None, **options) -> Vqvae:
    theirs = randomised(Vqvae(kind, **options), seed=61)
    save_file(theirs.state_dict(), folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(settings or {}))
    return theirs


def signal_of(kind: str) -> Tensor:
    generator = torch.Generator().manual_seed(5)
    channels, patch, labels = KINDS[kind]
    if labels:
        return torch.randint(0, labels, (4, SIDE * patch, SIDE * patch), generator=generator)
    return torch.randn(4, channels, SIDE * patch, SIDE * patch, generator=generator)


def opened(folder: Path, *overrides: str) -> convert.Conversion:
    return convert.convert(folder, [f"backbone.heads={HEADS}", *overrides])


@pytest.fixture(params=[{}, {"WIDTH": 36, "SIDE": 4, "CODES": 50, "LATENT": 8}], ids=["small", "larger"])
def sizes(request, monkeypatch):
    for name, value in request.param.items():
        monkeypatch.setitem(globals(), name, value)


@pytest.mark.parametrize(("dtype", "near"), [(torch.float32, 1e-5), (torch.float64, 1e-9)], ids=["float32", "float64"])
@pytest.mark.usefixtures("sizes")
@pytest.mark.parametrize(("has_mlp", "is_cosine"), [(True, True), (False, True), (True, False)])
@pytest.mark.parametrize("kind", KINDS)
def test_codes_and_what_they_stand_for_are_theirs(tmp_path: Path, kind, has_mlp, is_cosine, dtype, near):
    theirs = saved(tmp_path, kind, has_mlp=has_mlp, is_cosine=is_cosine).to(dtype)
    found = opened(tmp_path)
    assert (found.format, list(found.model.modalities), found.left) == ("fourm_tokenizer", [kind], {})
    model = found.model.to(dtype)
    x = signal_of(kind) if KINDS[kind][2] else signal_of(kind).to(dtype)
    tokenizer = M3Tokenizer(model)
    with torch.no_grad():
        codes = theirs.tokens(x)
        expected = theirs.decode(codes)
        own: Any = model.objectives["autoencode"]
        places = model.tokenizers[kind].tokenize(x)
        assert torch.equal(tokenizer.encode(x), codes.flatten(1))
        assert len(codes.unique()) > 8
        output = own._decode(own.quantiser.decode(codes.flatten(1)), places)
        if KINDS[kind][2]:  # scores of the classes (B, n, h w K)
            scores = output.unflatten(-1, (-1, KINDS[kind][2])).unflatten(1, (SIDE, SIDE)).unflatten(3, (4, 4))
            assert difference(scores.permute(0, 5, 1, 3, 2, 4).flatten(4).flatten(2, 3), expected) < near
            assert torch.equal(tokenizer.decode(codes.flatten(1)), expected.argmax(1))
        else:
            assert difference(model.tokenizers[kind].detokenize(output, places.positions, x.shape[2:]), expected) < near
            assert difference(tokenizer.decode(codes.flatten(1)), expected) < near


@pytest.mark.parametrize("options", [{}, {"has_mlp": False}, {"is_cosine": False}, {"has_decoder": False}])
@pytest.mark.parametrize("kind", KINDS)
def test_the_file_comes_back_equal(tmp_path: Path, kind, options):
    settings = {"ema_decay": 0.9, "commitment_weight": 0.5}
    theirs = saved(tmp_path, kind, settings, **options)
    model = opened(tmp_path).model
    quantiser = model.config.objectives["autoencode"]["quantiser"]
    assert (quantiser["decay"], quantiser["commitment"]) == (0.9, 0.5)
    convert.save(model, tmp_path / "ours", "fourm_tokenizer")
    assert_equal(tensors_in(tmp_path / "ours"), theirs.state_dict())
    config = json.loads((tmp_path / "ours" / "config.json").read_text())
    assert (config["codebook_size"], config["latent_dim"], config["n_labels"]) == (CODES, LATENT, KINDS[kind][2])
    assert (config["n_channels"], config["patch_proj"]) == (KINDS[kind][0], kind != "features")
    assert (config["post_mlp"], config["norm_codes"]) == (options.get("has_mlp", True), options.get("is_cosine", True))
    assert (config["ema_decay"], config["commitment_weight"]) == (0.9, 0.5)


def test_a_diffusion_decoder_stays_behind_and_the_codes_are_the_same(tmp_path: Path):
    theirs = saved(tmp_path, "image", has_decoder=False)
    more = {"decoder.conv_in.weight": torch.randn(8, 3, 3, 3), "decoder.blocks.0.norm1.weight": torch.randn(8)}
    save_file(theirs.state_dict() | more, tmp_path / "model.safetensors")
    found = opened(tmp_path)
    assert set(found.left) == set(more)
    assert all("a diffusion model" in reason for reason in found.left.values())
    tokenizer = M3Tokenizer(found.model)
    codes = theirs.tokens(signal_of("image")).flatten(1)
    assert torch.equal(tokenizer.encode(signal_of("image")), codes)
    assert not tokenizer.is_two_way
    with pytest.raises(M3Error, match="this tokenizer of `image` only makes codes"):
        tokenizer.decode(codes)


def test_a_vit_decoder_with_convolutions_behind_stays_behind(tmp_path: Path):
    theirs = saved(tmp_path, "image")
    more = {"decoder.out_conv.0.norm.weight": torch.randn(3)}
    save_file(theirs.state_dict() | more, tmp_path / "model.safetensors")
    found = opened(tmp_path)
    assert {name.split(".")[0] for name in found.left} == {"decoder", "post_quant_proj"}


def test_codes_without_a_decoder_are_drawn_and_scored_as_numbers(tmp_path: Path):
    saved(tmp_path, "image", has_decoder=False)
    opened(tmp_path).model.save_pretrained(tmp_path / "ours")
    settings = {"type": "codes", "path": str(tmp_path / "ours")}
    part: Any = build_modalities({"codes": resolved(settings, "modalities.codes")})["codes"]
    assert part.to_raw(np.zeros((12, 12, 3), np.uint8)).shape == (SIDE, SIDE)
    truth = torch.arange(9).view(1, 3, 3)
    predicted = torch.where(truth < 6, truth, 0)
    sums = part.score(predicted, truth, torch.ones(1, 3, 3, dtype=torch.bool))
    assert (part.measure, part.finish_score(sums)) == ("accuracy of codes", pytest.approx(6 / 9))
    picture = part.show(truth[0], torch.tensor([[False, True, True]] * 3))
    assert picture.shape == (24, 24, 3)
    assert (picture[:8, :8] == 128).all()
    assert (picture[8, 8] == picture[15, 15]).all()
    assert (picture[8, 8] != picture[8, 16]).any()


def test_three_channels_may_be_normals(tmp_path: Path):
    saved(tmp_path, "image")
    assert any("modalities.image.type=normals" in note for note in opened(tmp_path).notes)
    assert opened(tmp_path, "modalities.image.type=normals").model.config.modalities["image"]["type"] == "normals"


def test_learned_positions_are_kept(tmp_path: Path):
    theirs = saved(tmp_path, "image")
    for side in (theirs.encoder, theirs.decoder):
        side.pos_emb.copy_(torch.randn(side.pos_emb.shape, generator=torch.Generator().manual_seed(7)))
    save_file(theirs.state_dict(), tmp_path / "model.safetensors")
    model = opened(tmp_path).model
    x = signal_of("image")
    assert torch.equal(M3Tokenizer(model).encode(x), theirs.tokens(x).flatten(1))
    convert.save(model, tmp_path / "ours", "fourm_tokenizer")
    assert_equal(tensors_in(tmp_path / "ours"), theirs.state_dict())


def test_a_missing_and_a_foreign_tensor_are_named(tmp_path: Path):
    tensors = saved(tmp_path, "depth").state_dict()
    save_file(tensors | {"quantize.project_in.weight": torch.ones(2, 2)}, tmp_path / "model.safetensors")
    with pytest.raises(M3Error, match=r"no place for `quantize\.project_in\.weight`"):
        opened(tmp_path)
    del tensors["quant_proj.bias"]
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(M3Error, match=r"`quant_proj\.bias` is missing"):
        opened(tmp_path)


def test_its_modalities_can_not_be_divided(tmp_path: Path):
    saved(tmp_path, "depth")
    with pytest.raises(M3Error, match="can't be taken by themselves; leave `modalities=` out"):
        opened(tmp_path, "modalities=depth")


@pytest.mark.parametrize("book", [{"quantize.codes": (16, 8, 4), "quantize.to_k.weight": (8, 8, 1)}, {}])
def test_tokenizers_with_an_mlp_are_refused_in_one_sentence(tmp_path: Path, book):
    names = {"quant_proj.weight": (8, 24), "encoder.layers.0.weight": (24, 24), "decoder.layers.0.weight": (24, 24)}
    names |= book or {"quantize._codebook.embed": (16, 8)}
    save_file({name: torch.ones(shape) for name, shape in names.items()}, tmp_path / "model.safetensors")
    with pytest.raises(
        M3Error, match=r"4M's tokenizer\): its codes are made by an MLP .*; take one with a ViT, or give"
    ):
        convert.load(tmp_path / "model.safetensors")
