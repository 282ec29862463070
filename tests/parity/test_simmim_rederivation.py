"""SimMIM written a second time from the paper's description: the same loss and gradients."""

import torch

from m3.config import M3Config
from m3.model import M3Model
from m3.network import Prepared
from tests.parity.slow_vit import Slow, check, in_double, make_batch, patches, position, random_weights

ROWS, COLUMNS, PATCH, WIDTH, HEADS, DEPTH = 4, 6, 4, 24, 3, 2
SEEN, PLACES = 8, ROWS * COLUMNS  # 2 of 6 cells of 2 x 2 patches


def build_model() -> M3Model:
    image = {"type": "image", "size": (ROWS * PATCH, COLUMNS * PATCH), "tokenizer": {"type": "patch", "size": PATCH}}
    objective = {
        "type": "reconstruct",
        "masking": {
            "type": "fixed",
            "visible": SEEN,
            "hidden": "replace",
            "scorer": {"type": "cells", "unit": 2},
        },
        "decoder": {"type": "head"},
        "targets": {"image": {"loss": "l1"}},
    }
    backbone = {"width": WIDTH, "depth": DEPTH, "heads": HEADS}
    return random_weights(
        M3Model(M3Config(modalities={"image": image}, backbone=backbone, objectives={"simmim": objective}))
    )


def simmim(model: M3Model, pixels: torch.Tensor, hidden: list[list[int]]) -> torch.Tensor:
    """Mean absolute error of the pixels of all hidden patches, read from the states of the mask tokens."""
    slow, total = Slow(dict(model.named_parameters())), []
    for image, asked in zip(pixels, hidden, strict=True):
        truth = patches(image, PATCH)
        embedded = slow.linear("tokenizers.image.projection", truth)
        rows = [slow.p["mask_tokens.image"][0] if i in asked else embedded[i] for i in range(PLACES)]
        x = torch.stack([row + position(i, COLUMNS, WIDTH) for i, row in enumerate(rows)])
        _, states = slow.encode(x, HEADS, DEPTH)
        guess = slow.linear("objectives.simmim.decoders.image.output", states[1:])
        total += [(guess[i] - truth[i]).abs().mean() for i in asked]
    return torch.stack(total).mean()


def test_loss_and_gradients_equal_simmim_written_from_the_paper() -> None:
    model, batch = build_model(), make_batch(2, ROWS * PATCH, COLUMNS * PATCH)
    prepared = model.prepare(batch)
    (plan,) = prepared.plans.values()
    hidden = plan.target["image"].tolist()
    cells = [sorted({(i // COLUMNS // 2, i % COLUMNS // 2) for i in row}) for row in hidden]
    assert [len(row) for row in hidden] == [PLACES - SEEN] * 2
    assert [len(row) for row in cells] == [4, 4], "whole cells are hidden"
    assert cells[0] != cells[1]
    found = model(Prepared(in_double(prepared.tokens), prepared.plans)).loss
    check(model, found, simmim(model, batch.signals["image"], hidden))
