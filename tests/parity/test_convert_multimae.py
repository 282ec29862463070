"""MultiMAE's layout, against the model written again with its names and shapes; its twin as a ViT, against timm's.

Letters: B samples, N tokens of a map, V tokens seen, D width of the encoder, d of the decoders.
"""

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from m3 import convert
from m3.errors import M3Error
from m3.types import MaskPlan
from tests.parity.published import (
    assert_equal,
    difference,
    encode_all,
    encoded_view,
    pixels,
    randomised,
    signals_of,
    tensors_in,
    tokens_of,
)
from tests.parity.published_blocks import Block, Mlp, attend

GRID, PATCH, CLASSES, WIDTH, INNER = 3, 4, 7, 192, 32
CHANNELS = {"rgb": 3, "depth": 1, "semseg": 5}
OURS = {"rgb": "image", "norm_rgb": "image_normalised", "depth": "depth", "semseg": "semantic"}


def table(width: int, dtype: torch.dtype = torch.float64) -> nn.Parameter:
    """Sines and cosines (1, width, rows, columns); the first half of the channels tells the row."""
    omega = 1.0 / 10000 ** (torch.arange(width // 4, dtype=dtype) / (width // 4))
    angle = torch.arange(GRID, dtype=dtype)[:, None] * omega
    one = torch.cat([angle.sin(), angle.cos()], dim=1).t().float()  # (half of the width, places)
    rows, columns = one[:, :, None].expand(-1, -1, GRID), one[:, None, :].expand(-1, GRID, -1)
    return nn.Parameter(torch.cat([rows, columns]).unsqueeze(0), requires_grad=False)


class InputAdapter(nn.Module):
    def __init__(self, name: str) -> None:
        super().__init__()
        self.pos_emb = table(WIDTH)
        if name == "semseg":
            self.class_emb = nn.Embedding(CLASSES, CHANNELS[name])
        size = PATCH // 2 if name == "semseg" else PATCH
        self.proj = nn.Conv2d(CHANNELS[name], WIDTH, size, stride=size)

    def forward(self, x: Tensor) -> Tensor:
        if not x.is_floating_point():
            x = self.class_emb(x).movedim(-1, 1)
        return (self.proj(x) + self.pos_emb).flatten(2).transpose(1, 2)


class CrossAttention(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.q, self.kv, self.proj = nn.Linear(width, width), nn.Linear(width, 2 * width), nn.Linear(width, width)

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        return self.proj(attend(self.q(x), *self.kv(context).chunk(2, -1), heads=8))


class OutputAdapter(nn.Module):
    """Of the target `name`; `seen` are the names of all inputs."""

    def __init__(self, name: str, seen: list[str], depth: int) -> None:
        super().__init__()
        self.task = "rgb" if name == "norm_rgb" else name
        self.mask_token, self.pos_emb = nn.Parameter(torch.zeros(1, 1, INNER)), table(INNER)
        self.task_embeddings = nn.ParameterDict({task: nn.Parameter(torch.zeros(1, 1, INNER)) for task in seen})
        self.proj_context = nn.Linear(WIDTH, INNER)
        self.decoder = CrossAttention(INNER)
        self.context_norm, self.query_norm, self.out_norm = (nn.LayerNorm(INNER, eps=1e-6) for _ in range(3))
        self.mlp = Mlp(INNER, 4 * INNER)
        self.decoder_transformer = nn.Sequential(*[Block(INNER, 8, 4 * INNER) for _ in range(depth)])
        values = {"rgb": 3 * PATCH**2, "depth": PATCH**2, "semseg": CLASSES * (PATCH // 2) ** 2}[self.task]
        self.out_proj = nn.Linear(INNER, values)

    def forward(self, states: dict[str, Tensor], last: Tensor, visible: dict[str, Tensor]) -> Tensor:
        """States of the tokens seen of each map (B, S, D) and of the global token -> (B, N, values)."""
        place = self.pos_emb.flatten(2).transpose(1, 2)
        queries, context = [], []
        for name, x in states.items():
            full = self.mask_token.expand(len(x), GRID**2, -1).clone()
            for sample, (row, seen) in enumerate(zip(self.proj_context(x), visible[name], strict=True)):
                full[sample, seen] = row
            full = full + place + self.task_embeddings[name]
            context.append(torch.stack([row[seen] for row, seen in zip(full, visible[name], strict=True)]))
            queries += [full] if name == self.task else []
        joined = torch.cat([*context, self.proj_context(last)], dim=1)
        x = self.decoder(self.query_norm(queries[0]), self.context_norm(joined))
        x = x + self.mlp(self.out_norm(x))
        return self.out_proj(self.decoder_transformer(x))


class MultiMae(nn.Module):
    def __init__(self, inputs: list[str], outputs: list[str], depth: int = 2) -> None:
        super().__init__()
        self.global_tokens = nn.Parameter(torch.zeros(1, 1, WIDTH))
        self.input_adapters = nn.ModuleDict({name: InputAdapter(name) for name in inputs})
        self.encoder = nn.Sequential(*[Block(WIDTH, WIDTH // 64, 4 * WIDTH) for _ in range(2)])
        adapters = {name: OutputAdapter(name, inputs, depth) for name in outputs}
        if outputs:
            self.output_adapters = nn.ModuleDict(adapters)

    def encode(self, maps: dict[str, Tensor], visible: dict[str, Tensor]) -> Tensor:
        """(B, V + 1, D), the global token last."""
        parts = []
        for name, x in maps.items():
            full = self.input_adapters[name](x)
            parts.append(torch.stack([row[seen] for row, seen in zip(full, visible[name], strict=True)]))
        parts.append(self.global_tokens.expand(len(parts[0]), -1, -1))
        return self.encoder(torch.cat(parts, dim=1))

    def forward(self, maps: dict[str, Tensor], visible: dict[str, Tensor]) -> dict[str, Tensor]:
        x = self.encode(maps, visible)
        *parts, last = x.split([*(seen.shape[1] for seen in visible.values()), 1], dim=1)
        states = dict(zip(visible, parts, strict=True))
        return {name: adapter(states, last, visible) for name, adapter in self.output_adapters.items()}


def saved(folder: Path, inputs: list[str], outputs: list[str], depth: int = 2) -> tuple[Path, MultiMae]:
    theirs = randomised(MultiMae(inputs, outputs, depth), seed=21)
    torch.save({"model": theirs.state_dict(), "epoch": 1}, folder / "theirs.pth")
    return folder / "theirs.pth", theirs


def maps(count: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(8)
    side = GRID * PATCH
    return {
        "image": pixels(count, (side, side)),
        "depth": torch.rand(count, side, side, generator=generator),
        "semantic": torch.randint(0, CLASSES, (count, side // 2, side // 2), generator=generator).to(torch.uint8),
    }


ALL = ["rgb", "depth", "semseg"]
CASES = [(ALL, [*ALL, "norm_rgb"], 2), (ALL, ALL, 1), (["rgb", "semseg"], ["semseg"], 0)]
VISIBLE = {"image": [[0, 4, 5], [1, 2, 8]], "depth": [[3], [7]], "semantic": [[2, 6], [0, 1]]}


@pytest.fixture(params=[{}, {"GRID": 4, "PATCH": 8, "WIDTH": 384, "INNER": 64}], ids=["small", "larger"])
def sizes(request, monkeypatch):
    for name, value in request.param.items():
        monkeypatch.setitem(globals(), name, value)


@pytest.mark.parametrize(("dtype", "near"), [(torch.float32, 1e-5), (torch.float64, 1e-9)], ids=["float32", "float64"])
@pytest.mark.usefixtures("sizes")
@pytest.mark.parametrize(("inputs", "outputs", "depth"), CASES)
def test_predictions_are_theirs(tmp_path: Path, inputs, outputs, depth, dtype, near):
    path, theirs = saved(tmp_path, inputs, outputs, depth)
    found = convert.convert(path)
    assert (found.format, found.left) == ("multimae", {})
    model, theirs = found.model.to(dtype), theirs.to(dtype)
    raw = {OURS[name]: maps(2)[OURS[name]] for name in inputs}
    signals = {n: model.modalities[n].normalise(x) for n, x in raw.items()}
    signals = {n: x.to(dtype) if x.is_floating_point() else x for n, x in signals.items()}
    visible = {name: torch.tensor(VISIBLE[name]) for name in signals}
    encoded = encoded_view(model, signals, MaskPlan(visible=visible, target={}))
    everything = torch.arange(GRID**2).expand(2, -1)
    back = {own: name for name, own in OURS.items()}
    with torch.no_grad():
        expected = theirs({back[n]: x for n, x in signals.items()}, {back[n]: x for n, x in visible.items()})
    assert list(expected) == outputs
    for name, wanted in expected.items():
        own = model.objectives["reconstruct"].predict(OURS[name], encoded, tokens_of(model, signals), everything)
        if name == "semseg":  # theirs: class first
            own = own.unflatten(-1, (-1, CLASSES)).transpose(-1, -2).flatten(2)
        assert difference(own, wanted) < near


@pytest.mark.parametrize(("inputs", "outputs", "depth"), [*CASES, (["depth"], [], 0)])
def test_the_file_comes_back_equal(tmp_path: Path, inputs, outputs, depth):
    path, theirs = saved(tmp_path, inputs, outputs, depth)
    convert.save(convert.load(path), tmp_path / "ours.pth", "multimae")
    assert_equal(tensors_in(tmp_path / "ours.pth"), theirs.state_dict())


def test_what_is_learned_is_the_paper_s(tmp_path: Path):
    path, _ = saved(tmp_path, ALL, [*ALL, "norm_rgb"])
    objective = convert.load(path).config.objectives["reconstruct"]
    assert objective["masking"] == {"type": "dirichlet", "visible": 27 // 6, "alpha": 1.0}
    losses = {name: target["loss"] for name, target in objective["targets"].items()}
    assert losses == {"image": "mse", "image_normalised": "mse", "depth": "l1", "semantic": "cross_entropy"}


def test_tables_that_were_worked_out_in_single_precision_are_known_and_written_anew(tmp_path: Path):
    _, theirs = saved(tmp_path, ["rgb"], [])
    rough = table(WIDTH, torch.float32)
    theirs.input_adapters["rgb"].pos_emb = rough
    torch.save(theirs.state_dict(), tmp_path / "theirs.pth")
    convert.save(convert.load(tmp_path / "theirs.pth"), tmp_path / "ours.pth", "multimae")
    written = tensors_in(tmp_path / "ours.pth")["input_adapters.rgb.pos_emb"]
    assert 0 < (written - rough).abs().max() < 1e-6
    theirs.input_adapters["rgb"].pos_emb.data += 1e-4
    torch.save(theirs.state_dict(), tmp_path / "theirs.pth")
    with pytest.raises(M3Error, match=r"`input_adapters\.rgb\.pos_emb` is not the fixed"):
        convert.load(tmp_path / "theirs.pth")


def test_the_twin_in_timms_names_is_a_vit_with_the_rows_first(tmp_path: Path):
    """Their tool's: the pictures alone, the global token as class token; theirs has no norm behind the blocks."""
    timm = pytest.importorskip("timm")
    _, theirs = saved(tmp_path, ["rgb"], [])
    twin = {"cls_token": theirs.global_tokens.data}
    place = theirs.input_adapters["rgb"].pos_emb.data.flatten(2).transpose(1, 2)
    twin["pos_embed"] = torch.cat([torch.zeros(1, 1, WIDTH), place], dim=1)
    for name, x in theirs.state_dict().items():
        if name.startswith(("encoder.", "input_adapters.rgb.proj.")):
            twin[name.replace("encoder.", "blocks.").replace("input_adapters.rgb.", "patch_embed.")] = x
    torch.save({"model": twin}, tmp_path / "twin.pth")
    found = convert.convert(tmp_path / "twin.pth")
    assert found.format == "vit"
    assert found.model.config.backbone["axis_order"] == "yx"
    assert "positions" not in found.model.config.modalities["image"]
    vit = timm.models.vision_transformer.VisionTransformer(
        img_size=12, patch_size=4, embed_dim=WIDTH, depth=2, num_heads=3, num_classes=0, global_pool="",
        final_norm=False,
    ).eval()  # fmt: skip
    vit.load_state_dict(twin)
    signals = signals_of(found.model, {"image": pixels(2, (12, 12))}, torch.float32)
    with torch.no_grad():
        expected = vit(signals["image"])
        own = theirs.encode({"rgb": signals["image"]}, {"rgb": torch.arange(9).expand(2, -1)})
    assert difference(encode_all(found.model, signals), expected) < 1e-6
    assert difference(expected, own.roll(1, dims=1)) < 1e-6
    convert.save(found.model, tmp_path / "ours.pth", "vit")
    assert_equal(tensors_in(tmp_path / "ours.pth"), twin)


def test_a_missing_and_a_foreign_tensor_are_named(tmp_path: Path):
    path, theirs = saved(tmp_path, ALL, ["depth"])
    tensors = theirs.state_dict()
    torch.save(tensors | {"output_adapters.depth.task_embeddings.normal": torch.ones(1, 1, INNER)}, path)
    with pytest.raises(M3Error, match=r"no place for `output_adapters\.depth\.task_embeddings\.normal`"):
        convert.load(path)
    del tensors["output_adapters.depth.decoder.kv.weight"]
    torch.save(tensors, path)
    with pytest.raises(M3Error, match=r"`output_adapters\.depth\.decoder\.kv\.weight` is missing"):
        convert.load(path)
    torch.save(theirs.state_dict() | {"input_adapters.normal.proj.weight": torch.ones(1)}, path)
    with pytest.raises(M3Error, match=r"`input_adapters\.normal` is of a modality that is not one of rgb"):
        convert.load(path)
