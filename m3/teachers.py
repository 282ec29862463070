"""Frozen teachers: networks of timm and open_clip whose features are something to see or to predict.

They live outside the model: no parameter of theirs is trained or saved. Letters: B batch, C channels, H height,
W width, h, w the teacher's grid.
"""

from __future__ import annotations

from contextlib import nullcontext
from copy import deepcopy
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from m3.errors import M3Error, nearest

CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


class Teacher(NamedTuple):
    """A frozen network.

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
        """Return the last layer's features (B, C, h, w) float32 of uint8 or float pixels (B, 3, H, W), 0 to 255."""
        # The network is shared by the whole process: working shapes out must not take its weights away.
        network: Any = deepcopy(self.network).to("meta") if pixels.is_meta else self.network.to(pixels.device)
        shape = (1, 3, 1, 1)
        mean, std = (torch.tensor(v, device=pixels.device).view(shape) for v in (self.mean, self.std))
        x = (pixels.float() / 255 - mean) / std
        with nullcontext() if pixels.is_meta else torch.autocast(pixels.device.type, enabled=False):
            if self.is_clip:
                return network.forward_intermediates(
                    x, indices=1, normalize_intermediates=True, intermediates_only=True
                )["image_intermediates"][-1]
            return network.forward_intermediates(x, indices=1, norm=True, intermediates_only=True, output_fmt="NCHW")[
                -1
            ]


@cache
def open_teacher(name: str, weights: str | None, size: tuple[int, int]) -> Teacher:
    """Build a teacher once per process.

    Args:
        name: `timm:MODEL` or `open_clip:MODEL`, e.g. `timm:vit_small_patch16_224`, `open_clip:ViT-B-16`.
        weights: safetensors or .pth file of its state; None: random weights of seed 0, the same everywhere.
        size: height and width of the pictures it will see.

    Raises:
        M3Error: no such model or file, a missing library, or weights of another model.
    """
    library, _, model = name.partition(":")
    if library not in ("timm", "open_clip") or not model:
        raise M3Error(f"the teacher `{name}` must be written as timm:MODEL or open_clip:MODEL.")
    with torch.random.fork_rng(devices=[]), torch.device("cpu"):
        torch.manual_seed(0)
        network, mean, std = (_timm if library == "timm" else _open_clip)(model, size)
    if weights is not None:
        _load(network, Path(weights).expanduser(), name)
    return Teacher(network.eval().requires_grad_(False), mean, std, library == "open_clip")


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
