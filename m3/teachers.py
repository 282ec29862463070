"""Frozen teachers: networks whose features are something to see or to predict, of timm, open_clip or our own.

They live outside the model: no parameter of theirs is trained or saved. Letters: B batch, C channels, H height,
W width, h, w the teacher's grid, N = h w its tokens.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from contextlib import AbstractContextManager, nullcontext
from copy import deepcopy
from dataclasses import dataclass
from functools import cache
from math import prod
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from pydantic import PositiveInt
from torch import Tensor, nn

from m3.errors import M3Error, nearest
from m3.plugins import Strict, Tokenizer
from m3.types import Tokens

CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


class Teacher(ABC):
    """A frozen network that looks at pictures: uint8 or float pixels (B, 3, H, W), 0 to 255.

    It computes in float32, without gradients, where the pixels are; of pixels on the device `meta` it tells shapes.
    """

    @abstractmethod
    def __call__(self, pixels: Tensor) -> Tensor:
        """Return the last layer's features (B, C, h, w) float32, normed if the network ends with a norm."""

    @abstractmethod
    def layers(self, pixels: Tensor, count: int) -> Tensor:
        """Return the states after the last `count` blocks, not normed: (count, B, 1 + N, C), the class token first."""

    @abstractmethod
    def attention(self, pixels: Tensor) -> Tensor:
        """Return how much the class token attends to each token in the last block, mean over heads (B, N)."""


@dataclass(frozen=True)
class LibraryTeacher(Teacher):
    """A network of timm or open_clip.

    Attributes:
        network: in evaluation mode, without gradients.
        mean: per channel of the pixels in [0, 1] that it was trained with.
        std: likewise.
        is_clip: made by open_clip.
    """

    network: nn.Module
    mean: tuple[float, ...]
    std: tuple[float, ...]
    is_clip: bool

    @torch.no_grad()
    def __call__(self, pixels: Tensor) -> Tensor:
        """Return the last layer's features (B, C, h, w)."""
        return self._features(*self._ready(pixels))

    @torch.no_grad()
    def layers(self, pixels: Tensor, count: int) -> Tensor:
        """Return the states after the last `count` blocks (count, B, 1 + N, C)."""
        network, x = self._ready(pixels)
        with exactly(pixels):
            if self.is_clip:
                found = network.forward_intermediates(
                    x, indices=count, intermediates_only=True, output_fmt="NLC", output_extra_tokens=True
                )
                pairs = list(zip(found["image_intermediates"], found["image_intermediates_prefix"], strict=True))
            else:
                pairs = network.forward_intermediates(
                    x, indices=count, intermediates_only=True, output_fmt="NLC", return_prefix_tokens=True
                )
        return torch.stack([torch.cat([prefix[:, :1], states], dim=1) for states, prefix in pairs])

    @torch.no_grad()
    def attention(self, pixels: Tensor) -> Tensor:
        """Return how much the class token attends to each token in the last block (B, N)."""
        network, x = self._ready(pixels)
        layer: Any = (network.transformer.resblocks if self.is_clip else network.blocks)[-1].attn
        kept: list[Tensor] = []
        handle = layer.register_forward_pre_hook(lambda _, inputs: kept.append(inputs[0]))
        try:
            self._features(network, x)
        finally:
            handle.remove()
        with exactly(pixels):
            (read,) = kept
            qkv = F.linear(read, layer.in_proj_weight, layer.in_proj_bias) if self.is_clip else layer.qkv(read)
            q, k, _ = qkv.unflatten(-1, (3, layer.num_heads, -1)).permute(2, 0, 3, 1, 4)
            if not self.is_clip:
                q, k = layer.q_norm(q), layer.k_norm(k)
            scores = q[:, :, :1] @ k.transpose(-1, -2) * q.shape[-1] ** -0.5
        return scores.softmax(-1).mean(1)[:, 0, 1 if self.is_clip else network.num_prefix_tokens :]

    def _features(self, network: Any, x: Tensor) -> Tensor:
        """Return the last layer's features (B, C, h, w) of what `_ready` gives."""
        with exactly(x):
            if self.is_clip:
                return network.forward_intermediates(
                    x, indices=1, normalize_intermediates=True, intermediates_only=True
                )["image_intermediates"][-1]
            return network.forward_intermediates(x, indices=1, norm=True, intermediates_only=True, output_fmt="NCHW")[
                -1
            ]

    def _ready(self, pixels: Tensor) -> tuple[Any, Tensor]:
        """Return the network where the pixels are, and these as it wants them."""
        # The network is shared by the whole process: working shapes out must not take its weights away.
        network: Any = deepcopy(self.network).to("meta") if pixels.is_meta else self.network.to(pixels.device)
        shape = (1, 3, 1, 1)
        mean, std = (torch.tensor(v, device=pixels.device).view(shape) for v in (self.mean, self.std))
        return network, (pixels.float() / 255 - mean) / std


def exactly(x: Tensor) -> AbstractContextManager[None]:
    """Compute in float32, whatever the model does."""
    return nullcontext() if x.is_meta else torch.autocast(x.device.type, enabled=False)  # type: ignore[return-value]


class TeacherSpec(Strict):
    """What a part that looks at pictures through a teacher must know.

    Attributes:
        model: `timm:MODEL`, `open_clip:MODEL`, or `m3:FOLDER` of a trained model of our own, e.g. m3:runs/NAME/model,
            which reads pictures (exactly one modality of type `image`).
        weights: file of the teacher's state; null: random weights, or those of a model of our own.
        size: height and width of the picture that it sees; null: as it is. It must give as many tokens as the model.
        width: C of its features, filled in when the model is built, for where the teacher's folder is gone.
    """

    model: str
    weights: str | None = None
    size: PositiveInt | tuple[PositiveInt, PositiveInt] | None = None
    width: PositiveInt | None = None

    def size_of(self, tokenizer: Tokenizer) -> tuple[int, int]:
        """Return height and width of the picture that the teacher sees."""
        if self.size is None:
            height, width = tokenizer.signal.size
            return height, width
        return (self.size, self.size) if isinstance(self.size, int) else self.size

    def open(self, tokenizer: Tokenizer) -> Teacher:
        """Return the teacher; built when it is first needed."""
        return open_teacher(self.model, self.weights, self.size_of(tokenizer))

    @property
    def is_gone(self) -> bool:
        """True for a model of our own whose folder is not there: a student that only encodes does without."""
        kind, _, folder = self.model.partition(":")
        return kind == "m3" and not (Path(folder).expanduser() / "config.json").is_file()

    def channels(self, tokenizer: Tokenizer) -> int:
        """Return C without reading the weights, which a model that is only used does not need.

        Raises:
            M3Error: the modality is no picture, or the teacher's tokens are not those of the model.
        """
        if len(tokenizer.signal.size) != 2 or tokenizer.signal.kind != "values":
            raise M3Error("a teacher looks at pictures; this modality is none.")
        _check_weights(self.model, self.weights)
        if self.width is not None and self.is_gone:
            return self.width
        size = self.size_of(tokenizer)
        count, channels = _shape(self.model, size)
        wanted = prod(tokenizer.reference)
        if count != wanted:
            raise M3Error(
                f"the teacher `{self.model}` makes {count} tokens of a picture of {size[0]} x {size[1]}, the model "
                f"{wanted}; choose another `size` for it."
            )
        return channels

    def pictures(self, tokenizer: Tokenizer, tokens: Tokens) -> Tensor:
        """Return the pictures that tokens were cut from, 0 to 255, at the teacher's size (B, 3, h, w)."""
        if tokens.count != prod(tokenizer.reference):
            raise M3Error("a teacher needs pictures of the size that the model is built for; resize them.")
        signal = tokenizer.detokenize(tokens.values, tokens.positions, tokenizer.signal.size)
        pixels, size = 255 * tokenizer.modality.pixels(signal), self.size_of(tokenizer)
        if pixels.shape[2:] == size:
            return pixels
        return F.interpolate(pixels, size, mode="bicubic", antialias=True, align_corners=False).clamp(0, 255)


@cache
def _shape(name: str, size: tuple[int, int]) -> tuple[int, int]:
    """Return the number of tokens and channels that a teacher makes of a picture."""
    features = open_teacher.__wrapped__(name, None, size)(torch.zeros(1, 3, *size, device="meta"))
    return features.shape[2] * features.shape[3], features.shape[1]


@cache
def open_teacher(name: str, weights: str | None, size: tuple[int, int]) -> Teacher:
    """Build a teacher once per process.

    Args:
        name: `timm:MODEL`, `open_clip:MODEL` or `m3:FOLDER`, e.g. `timm:vit_small_patch16_224`, `open_clip:ViT-B-16`,
            `m3:runs/mae_tiny/model`.
        weights: safetensors or .pth file of its state; None: random weights of seed 0, the same everywhere, or those
            in the folder.
        size: height and width of the pictures it will see.

    Raises:
        M3Error: no such model, folder or file, a missing library, weights of another model, or a model of our own that
            does not look at pictures of this size.
    """
    library, _, model = name.partition(":")
    if library not in ("timm", "open_clip", "m3") or not model:
        raise M3Error(f"the teacher `{name}` must be written as timm:MODEL, open_clip:MODEL or m3:FOLDER.")
    _check_weights(name, weights)
    if library == "m3":
        from m3.own_teacher import OwnTeacher

        return OwnTeacher(str(Path(model).expanduser()), size)
    with torch.random.fork_rng(devices=[]), torch.device("cpu"):
        torch.manual_seed(0)
        network, mean, std = (_timm if library == "timm" else _open_clip)(model, size)
    if weights is not None:
        _load(network, Path(weights).expanduser(), name)
    return LibraryTeacher(network.eval().requires_grad_(False), mean, std, library == "open_clip")


def _check_weights(name: str, weights: str | None) -> None:
    if name.startswith("m3:") and weights is not None:
        raise M3Error(f"weights: the teacher `{name}` has its own in its folder; leave `weights` out.")


def _timm(model: str, size: tuple[int, int]) -> tuple[nn.Module, tuple[float, ...], tuple[float, ...]]:
    try:
        import timm
    except ImportError as error:
        raise M3Error("this teacher needs timm; run `pip install 'm3-multimodal[vision]'`.") from error
    if model not in timm.list_models():
        raise M3Error(f"timm knows no model `{model}`.{nearest(model, timm.list_models())[:200]}")
    sized: dict[str, Any] = {"img_size": size} if "vit" in model or "deit" in model or "beit" in model else {}
    network: Any = timm.create_model(model, pretrained=False, num_classes=0, **sized)
    return network, tuple(network.pretrained_cfg["mean"]), tuple(network.pretrained_cfg["std"])


def _open_clip(model: str, size: tuple[int, int]) -> tuple[nn.Module, tuple[float, ...], tuple[float, ...]]:
    try:
        import open_clip
    except ImportError as error:
        raise M3Error("this teacher needs open_clip; run `pip install 'm3-multimodal[vision]'`.") from error
    if model not in open_clip.list_models():
        raise M3Error(f"open_clip knows no model `{model}`.{nearest(model, open_clip.list_models())[:200]}")
    whole: Any = open_clip.create_model(model, pretrained=None, force_image_size=size)
    return whole.visual, CLIP_MEAN, CLIP_STD


def _load(network: nn.Module, path: Path, name: str) -> None:
    if not path.is_file():
        raise M3Error(f"there is no file {path} for the weights of the teacher `{name}`; check the path.")
    if path.suffix == ".safetensors":
        from safetensors.torch import load_file

        state: dict[str, Any] = load_file(path)
    else:
        state = torch.load(path, map_location="cpu", weights_only=True)
    state = state.get("state_dict", state)
    if any(key.startswith("visual.") for key in state):  # a whole CLIP model
        state = {key.removeprefix("visual."): value for key, value in state.items() if key.startswith("visual.")}
    wanted = network.state_dict()
    lacking = [key for key, value in wanted.items() if key not in state or state[key].shape != value.shape]
    if lacking:
        raise M3Error(f"{path} is not a state of the teacher `{name}`: {lacking[0]} is missing or of another shape.")
    network.load_state_dict({key: state[key] for key in wanted})
