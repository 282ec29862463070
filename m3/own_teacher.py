"""A trained model of our own as a frozen teacher.

Letters: B batch, C width of the transformer that reads the pictures, H height, W width, h, w its grid, N = h w its
tokens, R prefix tokens.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from m3.config import M3Config
from m3.errors import M3Error, within
from m3.evaluate.attention_maps import attention
from m3.model import M3Model
from m3.parts import find
from m3.progress import no_progress_bars
from m3.teachers import Teacher, exactly
from m3.types import Batch


class OwnTeacher(Teacher):
    """What a model makes of pictures, of which it is shown nothing else.

    Its weights are read when the first pictures come; until then, and for shapes, a twin without weights will do.

    Attributes:
        folder: that the model was saved to.
        twin: the model on the device `meta`.
        name: of the modality that reads the pictures.
        grid: (h, w).
    """

    def __init__(self, folder: str, size: tuple[int, int]) -> None:
        self.folder, self.twin = folder, _described(folder)
        self.name = _picture(self.twin, folder, size)
        self.grid = self.twin.blank_tokens(self.name, 1).counts or ()
        if len(self.grid) != 2:
            raise M3Error(f"the teacher `m3:{folder}` makes no grid of tokens of a picture; choose another model.")
        self._model: M3Model | None = None

    def __call__(self, pixels: Tensor) -> Tensor:
        """Return the last layer's features (B, C, h, w)."""
        with exactly(pixels):
            encoded = self._on(pixels.device).encode(self._batch(pixels))
        return encoded.states.transpose(1, 2).unflatten(2, self.grid)

    def layers(self, pixels: Tensor, count: int) -> Tensor:
        """Return the states after the last `count` blocks (count, B, 1 + N, C).

        Raises:
            M3Error: there is no class token, or there are fewer blocks.
        """
        depth = self._check_class_token().depth
        if count > depth:
            raise M3Error(f"the teacher `m3:{self.folder}` has {depth} blocks, not {count}; lower `layers`.")
        numbers = tuple(range(depth - count, depth))
        with exactly(pixels):
            encoded = self._on(pixels.device).encode(self._batch(pixels), numbers)
        states = torch.stack([encoded.layers[number] for number in numbers])  # (count, B, R + N, C)
        return torch.cat([states[:, :, :1], states[:, :, encoded.prefix_count :]], dim=2)

    def attention(self, pixels: Tensor) -> Tensor:
        """Return how much the class token attends to each token in the last block (B, N).

        Raises:
            M3Error: there is no class token.
        """
        self._check_class_token()
        model = self._on(pixels.device)
        with exactly(pixels):
            weights, encoded = attention(model, model.tower_of[self.name], self._batch(pixels))
        return weights[:, :, 0, encoded.prefix_count :].mean(1)

    def _check_class_token(self) -> Any:
        """Return the settings of the transformer that reads the pictures."""
        tower = self.twin.tower_of[self.name]
        transformer: Any = self.twin.towers[tower] if tower else self.twin.backbone
        if not transformer.spec.class_tokens:
            raise M3Error(
                f"the teacher `m3:{self.folder}` has no class token, whose states or attention are asked for; choose a "
                f"model that was trained with one (class_tokens: 1)."
            )
        return transformer.spec

    def _batch(self, pixels: Tensor) -> Batch:
        return Batch({self.name: pixels}, torch.arange(len(pixels)))

    def _on(self, device: torch.device) -> M3Model:
        """Return the model where the pictures are; its weights are read when they are first needed."""
        if device.type == "meta":
            return self.twin
        if self._model is None:
            try:
                with no_progress_bars(), torch.device("cpu"):
                    model = M3Model.from_pretrained(self.folder, dtype=torch.float32)
            except (OSError, ValueError) as error:
                raise _missing(self.folder, str(error)) from error
            self._model = model.eval().requires_grad_(False)
        if self._model.device != device:
            nn.Module.to(self._model, device)
        return self._model


def _described(folder: str) -> M3Model:
    """Return the model of a folder without memory for its weights.

    Raises:
        M3Error: there is none of ours.
    """
    if not (Path(folder) / "config.json").is_file():
        raise _missing(folder, "it has no config.json")
    try:
        settings, _ = M3Config.get_config_dict(folder)
    except OSError as error:
        raise _missing(folder, str(error)) from None
    if settings.get("model_type") != M3Config.model_type:
        kind = settings.get("model_type", "unknown")
        raise M3Error(f"`{folder}` holds a model of type `{kind}`, none of ours; make it one with `m3 convert`.")
    with within(f"the teacher `m3:{folder}`"), torch.device("meta"):
        return M3Model(M3Config.from_dict(settings)).eval()


def _missing(folder: str, why: str) -> M3Error:
    return M3Error(
        f"there is no model in `{folder}` for a teacher ({why.splitlines()[0]}); give the model folder of a run, e.g. "
        f"m3:runs/mae_tiny/model after `m3 train mae_tiny`."
    )


def _picture(model: M3Model, folder: str, size: tuple[int, int]) -> str:
    """Return the name of the only modality of pictures that a model reads, which must be of a size.

    Raises:
        M3Error: there is none, there are several, or they have another size.
    """
    image: Any = find("modalities", "image")
    found = [name for name in model.inputs if isinstance(model.modalities[name], image)]
    if len(found) != 1:
        raise M3Error(
            f"the teacher `m3:{folder}` must read exactly one modality of type `image`, but it reads "
            f"{', '.join(found) or 'none'}; choose another model."
        )
    (name,) = found
    signal = model.modalities[name].signal
    if signal.channels != 3:
        raise M3Error(f"the teacher `m3:{folder}` reads pictures of {signal.channels} channels, not 3; choose another.")
    height, width = signal.size
    if (height, width) != size:
        raise M3Error(
            f"the teacher `m3:{folder}` reads pictures of {height} x {width}, not {size[0]} x {size[1]}; set its "
            f"`size` to [{height}, {width}] or choose another model."
        )
    return name
