"""I-JEPA and data2vec 2.0 written a second time from their papers: the same losses and gradients; and their teacher."""

import torch
import torch.nn.functional as F

from m3.config import M3Config
from m3.ema import Average
from m3.model import M3Model
from m3.network import Prepared
from m3.types import MaskPlan
from tests.parity.slow_vit import Slow, check, in_double, make_batch, patches, position, random_weights, standardised

ROWS, COLUMNS, PATCH, WIDTH, HEADS, DEPTH = 4, 6, 4, 24, 3, 3
PLACES = ROWS * COLUMNS
DECODER = {"width": 16, "depth": 2, "heads": 2}


def build_model(class_tokens: int, **latent) -> M3Model:
    image = {"type": "image", "size": (ROWS * PATCH, COLUMNS * PATCH), "tokenizer": {"type": "patch", "size": PATCH}}
    backbone = {"width": WIDTH, "depth": DEPTH, "heads": HEADS, "class_tokens": class_tokens}
    objectives = {"latent": {"type": "latent", **latent}}
    model = random_weights(M3Model(M3Config(modalities={"image": image}, backbone=backbone, objectives=objectives)))
    generator = torch.Generator().manual_seed(23)
    model.teacher = {
        name: p.detach() + 0.3 * torch.randn(p.shape, generator=generator, dtype=p.dtype)
        for name, p in model.named_parameters()
    }
    return model


def encode(weights: dict, image: torch.Tensor, seen: list[int]) -> tuple[list[torch.Tensor], torch.Tensor]:
    """The states of a ViT of some of the patches of an image, after each block and at the end."""
    slow = Slow(weights)
    x = slow.linear("tokenizers.image.projection", patches(image, PATCH)[seen])
    x = x + torch.stack([position(i, COLUMNS, WIDTH) for i in seen])
    return slow.encode(x, HEADS, DEPTH)


def decode(weights: dict, states: torch.Tensor, seen: list[int], asked: list[int], is_full: bool) -> torch.Tensor:
    """Predict the features at asked places from the states of prefix and seen places.

    I-JEPA's predictor knows the asked-for places alone; data2vec's and MAE's decoder (is_full) every place.
    """
    slow, name = Slow(weights), "objectives.latent.decoders.image"
    x = slow.linear(f"{name}.embed", states)
    prefix = x[: len(x) - len(seen)]
    by_place = dict(zip(seen, x[len(prefix) :], strict=True))
    token = slow.p[f"{name}.mask_token"][0]
    places = list(range(PLACES)) if is_full else [*seen, *asked]
    rows = [by_place.get(i, token) + position(i, COLUMNS, DECODER["width"]) for i in places]
    x = torch.cat([prefix, torch.stack(rows)])
    for number in range(DECODER["depth"]):
        x = slow.block(f"{name}.blocks.{number}", x, DECODER["heads"])
    x = x[len(prefix) :][[places.index(i) for i in asked]]
    return slow.linear(f"{name}.output", slow.norm(f"{name}.norm", x))


def test_ijepa_predicts_each_block_by_itself_from_the_context() -> None:
    masking = {"type": "target_blocks", "visible": 6, "blocks": 3, "size": 5, "context": [0.7, 1.0]}
    decoder = {"type": "self_decoder", "queries": "asked", **DECODER}
    model, batch = build_model(0, masking=masking, decoder=decoder), make_batch(2, ROWS * PATCH, COLUMNS * PATCH)
    prepared = model.prepare(batch)
    plan = prepared.plans[model.objectives["latent"].student_views[0]]
    losses, weights = [], dict(model.named_parameters())
    overlapping = 0
    for image, seen, asked in zip(
        batch.signals["image"], plan.visible["image"].tolist(), plan.target["image"].tolist(), strict=True
    ):
        _, features = encode_without_prefix(model.teacher, image, list(range(PLACES)))
        features = standardised(features, eps=1e-5)
        _, states = encode_without_prefix(weights, image, seen)
        overlapping += len(set(asked)) < 15
        for block in (asked[:5], asked[5:10], asked[10:]):
            error = (decode(weights, states, seen, block, is_full=False) - features[block]).abs()
            losses.append(torch.where(error < 1, error**2 / 2, error - 0.5))
    assert overlapping, "a case that tells blocks from their union"
    expected = torch.stack(losses).mean()
    found = model(Prepared(in_double(prepared.tokens), prepared.plans))
    check(model, found.loss, expected)
    assert found.parts.parts["latent/image"].count == model.counts(prepared)["latent/image"] == 2 * 15 * WIDTH


def encode_without_prefix(weights: dict, image: torch.Tensor, seen: list[int]):
    """I-JEPA has no class token."""
    return encode({"backbone.prefix": torch.zeros(0, WIDTH, dtype=torch.float64)} | weights, image, seen)


def test_data2vec_averages_standardised_blocks_over_several_masks_with_one_teacher_pass() -> None:
    masking = {"type": "fixed", "visible": 6, "scorer": {"type": "blocks", "of": "seen", "area": [4, 4], "aspect": 1.0}}
    decoder = {"type": "self_decoder", **DECODER}
    settings = {"masking": masking, "decoder": decoder, "masks": 3, "layers": 2, "loss": "mse", "weight": 4.0}
    model = build_model(1, **settings, class_weight=0.25)
    batch = make_batch(2, ROWS * PATCH, COLUMNS * PATCH)
    prepared = model.prepare(batch)
    views = model.objectives["latent"].student_views
    plans = [prepared.plans[view] for view in views]
    seen = [plan.visible["image"].tolist() for plan in plans]
    assert len({str(rows) for rows in seen}) == 3, "three different masks"
    losses, class_losses, weights = [], [], dict(model.named_parameters())
    for number, image in enumerate(batch.signals["image"]):
        blocks, _ = encode(model.teacher, image, list(range(PLACES)))
        features = sum(standardised(x[1:], dim=0, eps=1e-5) for x in blocks[-2:]) / 2
        features = standardised(features, eps=1e-5)
        for plan, rows in zip(plans, seen, strict=True):
            asked = plan.target["image"][number].tolist()
            _, states = encode(weights, image, rows[number])
            guess = decode(weights, states, rows[number], asked, is_full=True)
            losses.append((guess - features[asked]) ** 2)
            class_losses.append((states[0] - features.mean(0)) ** 2)
    expected = 4.0 * torch.stack(losses).mean() + 0.25 * torch.stack(class_losses).mean()
    calls = []
    handle = model.backbone.register_forward_hook(lambda *_: calls.append(1))
    found = model(Prepared(in_double(prepared.tokens), prepared.plans))
    handle.remove()
    check(model, found.loss, expected)
    assert len(calls) == 3 + 1
    for name, count in model.counts(prepared).items():
        assert found.parts.parts[name].count == count
    assert found.parts.parts["latent/class"].count == 2 * 3 * WIDTH


def test_the_teacher_gets_no_gradient_and_without_one_the_model_teaches_itself() -> None:
    model = build_model(0, masking={"type": "fixed", "visible": 6}, decoder={"type": "self_decoder", **DECODER})
    prepared = model.prepare(make_batch(2, ROWS * PATCH, COLUMNS * PATCH))
    own = Prepared(in_double(prepared.tokens), prepared.plans)
    for weight in model.teacher.values():
        weight.requires_grad_(True)
    model(own).loss.backward()
    assert all(weight.grad is None for weight in model.teacher.values())
    with torch.no_grad():
        other = model(own).loss
        model.teacher = None
        alone = model(own).loss
        model.teacher = {name: p.detach() for name, p in model.named_parameters()}
        same = model(own).loss
    assert torch.equal(alone, same)
    assert not torch.allclose(alone, other)


def test_the_average_is_the_teacher_and_moves_with_it() -> None:
    model = build_model(0, masking={"type": "fixed", "visible": 6}, decoder={"type": "self_decoder", **DECODER}).float()
    average = Average(model, 0.9)
    model.teacher = average.named(model)
    prepared = model.prepare(make_batch(2, ROWS * PATCH, COLUMNS * PATCH))
    (view,) = [view for view in model.views if view.is_teacher]
    plan: MaskPlan = prepared.plans[view]
    first = {name: p.detach().clone() for name, p in model.named_parameters()}
    before = model.encode_view(view, prepared.tokens, plan).sequence
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.5)
    assert torch.equal(model.encode_view(view, prepared.tokens, plan).sequence, before)
    average.update(model, 0.75)
    for name, weight in model.teacher.items():
        torch.testing.assert_close(weight, 0.75 * first[name] + 0.25 * 1.5 * first[name])
    moved = model.encode_view(view, prepared.tokens, plan).sequence
    assert not torch.allclose(moved, before)
    average.load_state_dict({key: F.pad(value, (0, 0)) * 0 + 1 for key, value in average.state_dict().items()})
    assert all((weight == 1).all() for weight in model.teacher.values()), "a resumed average is the same tensors"
    assert model.state_dict().keys() == dict(model.named_parameters()).keys()
