"""CLIP, FLIP, SigLIP, ALIGN, LiT, and MAE with CLIP, written a second time from the papers: losses and gradients.

The models are those of the recipes at a small size; what each paper says of towers, texts and losses stands below.
Letters: B samples, N tokens of a sample, D width of a tower, E width of the shared space.
"""

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from m3 import M3Processor
from m3.model import M3Model
from m3.network import Prepared
from m3.types import Batch, Tokens
from tests.parity.slow_vit import MEAN, STD, Slow, check, gelu, patches, position, recipe_model

ROWS, COLUMNS, PATCH, WIDTH, HEADS, DEPTH = 3, 4, 4, 16, 2, 2
PLACES = ROWS * COLUMNS
WORDS_WIDTH, WORDS_HEADS, WORDS_DEPTH, LENGTH, E = 12, 3, 2, 7, 10
DECODER = {"width": 8, "depth": 1, "heads": 2}
START, END = "<start_of_text>", "<end_of_text>"
VOCABULARY = ["a", "b", "c", "d", START, END]
SENTENCES = ["a b c", "d", "b b a d c", "c a"]
OPENAI = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
HALF = (0.5, 0.5, 0.5), (0.5, 0.5, 0.5)

SINCOS = torch.stack([position(number, COLUMNS, WIDTH) for number in range(PLACES)])


def quick_gelu(x: Tensor) -> Tensor:
    return x / (1 + torch.exp(-1.702 * x))


def gelu_tanh(x: Tensor) -> Tensor:
    return x * 0.5 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


# -- the models of the recipes, small -------------------------------------------------------------------------


def build_model(recipe: str, photo: str = "towers.photo", width: int = E) -> M3Model:
    """A recipe of a picture and a text; `photo` reads the picture, `width` is that of the shared space."""
    sizes = {photo: (WIDTH, HEADS, DEPTH), "towers.words": (WORDS_WIDTH, WORDS_HEADS, WORDS_DEPTH)}
    changes = [
        f"{tower}.{key}={value}"
        for tower, size in sizes.items()
        for key, value in zip(("width", "heads", "depth"), size, strict=True)
    ]
    changes += [f"modalities.image.size={[ROWS * PATCH, COLUMNS * PATCH]}", f"modalities.image.tokenizer.size={PATCH}"]
    changes += [f"modalities.text.vocabulary={VOCABULARY}", f"modalities.text.length={LENGTH}"]
    if recipe.startswith("mae_clip"):
        changes += [f"objectives.reconstruct.decoder.{key}={value}" for key, value in DECODER.items()]
        changes += [f"modalities.text.{key}={value}" for key, value in (("start", START), ("end", END))]
    return recipe_model(recipe, [*changes, f"objectives.contrast.width={width}"])


def make_pixels() -> Tensor:
    shape = (len(SENTENCES), 3, ROWS * PATCH, COLUMNS * PATCH)
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(11))


def prepare(model: M3Model, sentences: list[str | None]) -> tuple[Prepared, list[list[int]]]:
    """Read pictures and sentences; also return which patches of each picture are seen."""
    photos = list(make_pixels().permute(0, 2, 3, 1).numpy())
    batch: Batch = M3Processor(model.config.modalities)(image=photos, text=sentences)
    prepared = model.prepare(batch)
    doubled = {
        name: Tokens(x.values.double() if name == "image" else x.values, x.positions, x.is_valid)
        for name, x in prepared.tokens.items()
    }
    (plan,) = [plan for view, plan in prepared.plans.items() if view.modalities == ("image",)]
    return Prepared(doubled, prepared.plans), plan.visible["image"].tolist()


# -- towers ---------------------------------------------------------------------------------------------------


class Towers(Slow):
    """A tower for the picture and one for the text."""

    photo = "towers.photo"

    def __init__(self, model: M3Model, activation: Callable[[Tensor], Tensor] = gelu, eps: float = 1e-6) -> None:
        super().__init__(dict(model.named_parameters()), activation=activation, eps=eps)

    def learned(self, name: str) -> Tensor:
        """Learned places, one row each."""
        return self.p[f"{name}.table"].flatten(1).T

    def picture(self, pixels: Tensor, seen: list[int], places: Tensor, statistics: tuple = (MEAN, STD)) -> Tensor:
        """States (N, D) of the seen patches of a picture, behind the class token where the tower has one."""
        x = self.linear("tokenizers.image.projection", patches(pixels, PATCH, *statistics)[seen])
        return self.encode(x + places[seen], HEADS, DEPTH, tower=self.photo)[1]

    def text(self, words: list[str], is_causal: bool = False) -> Tensor:
        """States (N, D) of a text; id 0 is for unknown words."""
        x = torch.stack([self.p["tokenizers.text.table.weight"][1 + VOCABULARY.index(word)] for word in words])
        x = x + self.learned("positions.text")[: len(words)]
        later = torch.ones(len(words), len(words), dtype=torch.float64).triu(1)
        bias = torch.zeros_like(later).masked_fill(later > 0, -torch.inf).expand(WORDS_HEADS, -1, -1)
        return self.encode(x, WORDS_HEADS, WORDS_DEPTH, bias if is_causal else None, "towers.words")[1]

    def project(self, side: str, x: Tensor, has_bias: bool = False) -> Tensor:
        name = f"objectives.contrast.projections.{side}"
        x = self.p[f"{name}.weight"] @ x
        return x + self.p[f"{name}.bias"] if has_bias else x

    def attention_pool(self, states: Tensor) -> Tensor:
        """A learned query attends to all states, an MLP with a residual follows (Zhai et al. 2021)."""
        name = "objectives.contrast.pools.image.attention"
        x = self.cross_attention(f"{name}.attention", self.p[f"{name}.query"], states, HEADS)
        return (x + self.mlp(f"{name}.mlp", self.norm(f"{name}.norm", x)))[0]


def filled(words: list[str]) -> list[str]:
    return words + [END] * (LENGTH - len(words))


def clip(model: M3Model, pixels: Tensor, seen: list[int], words: list[str]) -> tuple[Tensor, Tensor]:
    """Radford et al. 2021: norm before the blocks, class token; causal text between start and end, read at its end."""
    slow = Towers(model, quick_gelu, eps=1e-5)
    assert "towers.photo.input_norm.weight" in slow.p
    picture = slow.picture(pixels, seen, slow.learned("positions.image"), OPENAI)
    text = slow.text([START, *words, END], is_causal=True)
    return slow.project("image", picture[0]), slow.project("text", text[-1])


def flip(model: M3Model, pixels: Tensor, seen: list[int], words: list[str]) -> tuple[Tensor, Tensor]:
    """Li et al. 2022: half of the patches, mean of these and the class token; filled text, read at its first token."""
    assert len(seen) == PLACES // 2
    slow = Towers(model, gelu_tanh)
    picture, text = slow.picture(pixels, seen, SINCOS), slow.text(filled(words))
    assert len(picture) == 1 + len(seen)
    return slow.project("image", picture.mean(0)), slow.project("text", text[0])


def siglip(model: M3Model, pixels: Tensor, seen: list[int], words: list[str]) -> tuple[Tensor, Tensor]:
    """Zhai et al. 2023: attention pooling without class token; filled text, read at its last token, with a bias."""
    slow = Towers(model)
    picture = slow.picture(pixels, seen, slow.learned("positions.image"), HALF)
    assert len(picture) == PLACES
    text = slow.text(filled([*words, END]))
    return slow.attention_pool(picture), slow.project("text", text[-1], has_bias=True)


def align(model: M3Model, pixels: Tensor, seen: list[int], words: list[str]) -> tuple[Tensor, Tensor]:
    """Jia et al. 2021: mean of the patches as it is; text projected to its width from the first token, with a bias."""
    slow = Towers(model)
    picture, text = slow.picture(pixels, seen, SINCOS), slow.text([START, *words])
    assert len(picture) == 1 + PLACES
    return picture[1:].mean(0), slow.project("text", text[0], has_bias=True)


class OneTower(Towers):
    """The backbone reads the picture."""

    photo = "backbone"


def lit(model: M3Model, pixels: Tensor, seen: list[int], words: list[str]) -> tuple[Tensor, Tensor]:
    """Zhai et al. 2021: the class token of a locked tower as it is; text from its first token."""
    slow = OneTower(model)
    return slow.picture(pixels, seen, SINCOS)[0], slow.project("text", slow.text([START, *words])[0])


# -- losses, pair by pair -------------------------------------------------------------------------------------


def softmax(model: M3Model, pairs: list[tuple[Tensor, Tensor]], smoothing: float = 0.0) -> Tensor:
    """Cross-entropy of every picture among the texts and of every text among the pictures; the mean of the two.

    The right answer has the share 1 - smoothing of the target; `smoothing` is spread evenly over all.
    """
    scale = torch.exp(dict(model.named_parameters())["objectives.contrast.logit_scale"])
    losses = []
    for one, other in ((0, 1), (1, 0)):
        for i, own in enumerate(pairs):
            logits = [scale * cosine(own[one], candidate[other]) for candidate in pairs]
            total = torch.log(sum(torch.exp(logit) for logit in logits))
            shares = [smoothing / len(pairs) + (1 - smoothing if j == i else 0) for j in range(len(pairs))]
            losses.append(sum(share * (total - logit) for share, logit in zip(shares, logits, strict=True)))
    return sum(losses) / len(losses)


def sigmoid(model: M3Model, pairs: list[tuple[Tensor, Tensor]]) -> Tensor:
    """Log-loss of each picture with each text, whether they belong together; summed over these, mean over samples."""
    p = dict(model.named_parameters())
    scale, bias = torch.exp(p["objectives.contrast.logit_scale"]), p["objectives.contrast.logit_bias"]
    losses = []
    for i, (image, _) in enumerate(pairs):
        for j, (_, text) in enumerate(pairs):
            share = 1 / (1 + torch.exp(-(scale * cosine(image, text) + bias)))
            losses.append(-torch.log(share if i == j else 1 - share))
    return sum(losses) / len(pairs)


def cosine(a: Tensor, b: Tensor) -> Tensor:
    return (a * b).sum() / ((a**2).sum() * (b**2).sum()).sqrt()


def smoothed(model: M3Model, pairs: list[tuple[Tensor, Tensor]]) -> Tensor:
    return softmax(model, pairs, 0.1)


# -- tests ----------------------------------------------------------------------------------------------------

METHODS = {
    "clip_vit_b16": (clip, softmax, E),
    "flip_vit_b": (flip, softmax, E),
    "siglip_vit_b16": (siglip, sigmoid, WIDTH),
    "align_vit_b16": (align, smoothed, WIDTH),
}


def vectors(embed: Callable, model: M3Model, seen: list[list[int]], sentences: list[str | None]) -> list:
    """Picture and text of all samples that have both."""
    samples = zip(make_pixels(), seen, sentences, strict=True)
    return [embed(model, pixels, own, words.split()) for pixels, own, words in samples if words is not None]


@pytest.mark.parametrize("missing", [None, 2], ids=["complete", "a text is missing"])
@pytest.mark.parametrize("recipe", METHODS)
def test_loss_and_gradients_equal_those_of_the_paper(recipe: str, missing: int | None):
    embed, loss, width = METHODS[recipe]
    model = build_model(recipe, width=width)
    sentences = [None if i == missing else sentence for i, sentence in enumerate(SENTENCES)]
    prepared, seen = prepare(model, sentences)
    check(model, model(prepared).loss, loss(model, vectors(embed, model, seen, sentences)))


def test_flip_drops_other_patches_of_every_picture():
    _, seen = prepare(build_model("flip_vit_b"), SENTENCES)
    assert len(set(map(tuple, seen))) > 1


def test_no_gradient_reaches_the_locked_tower_of_lit():
    model = build_model("lit_vit_b16", "backbone", WIDTH)
    locked = {name for name, parameter in model.named_parameters() if not parameter.requires_grad}
    assert locked == {n for n, _ in model.named_parameters() if n.startswith(("backbone.", "tokenizers.image."))}
    prepared, seen = prepare(model, SENTENCES)
    expected = softmax(model, vectors(lit, model, seen, SENTENCES))
    check(model, model(prepared).loss, expected, unused=tuple(locked))
    model(prepared).loss.backward()
    assert {name for name, parameter in model.named_parameters() if parameter.grad is None} == locked


# -- MAE and CLIP together ------------------------------------------------------------------------------------


def hidden_patches(slow: Towers, states: Tensor, seen: list[int], places: Tensor) -> dict[int, Tensor]:
    """MAE's decoder (He et al. 2021): mask tokens take the places of hidden patches; what it says of those."""
    name = "objectives.reconstruct.decoders.image"
    x = slow.linear(f"{name}.embed", states)
    rows = [x[0]]
    for i in range(PLACES):
        rows.append((x[1 + seen.index(i)] if i in seen else slow.p[f"{name}.mask_token"][0]) + places[i])
    x = torch.stack(rows)
    for number in range(DECODER["depth"]):
        x = slow.block(f"{name}.blocks.{number}", x, DECODER["heads"])
    guesses = slow.linear(f"{name}.output", slow.norm(f"{name}.norm", x))
    return {i: guesses[1 + i] for i in range(PLACES) if i not in seen}


@pytest.mark.parametrize(("recipe", "is_normalised"), [("mae_clip_tiny", False), ("mae_clip_vit_b", True)])
def test_one_masked_view_gives_the_sum_of_both_losses(recipe: str, is_normalised: bool):
    """The tiny one learns its positions and completes pixels as they are."""
    model = build_model(recipe, "backbone")
    prepared, seen = prepare(model, SENTENCES)
    assert len(prepared.plans) == 2, "one view of the picture, one of the text"
    slow, errors, pairs = OneTower(model), [], []
    places, own_places = SINCOS, torch.stack([position(i, COLUMNS, DECODER["width"]) for i in range(PLACES)])
    if recipe == "mae_clip_tiny":
        places = slow.learned("positions.image")
        own_places = slow.learned("objectives.reconstruct.decoders.image.positions")
    for pixels, own, sentence in zip(make_pixels(), seen, SENTENCES, strict=True):
        assert len(own) == PLACES // 4
        states = slow.picture(pixels, own, places)
        for i, guess in hidden_patches(slow, states, own, own_places).items():
            truth = patches(pixels, PATCH)[i]
            if is_normalised:
                truth = (truth - truth.mean()) / (((truth - truth.mean()) ** 2).sum() / (len(truth) - 1) + 1e-6).sqrt()
            errors.append(((guess - truth) ** 2).mean())
        text = slow.text([START, *sentence.split(), END], is_causal=True)
        pairs.append((slow.project("image", states.mean(0)), slow.project("text", text[-1])))
    mae, contrast = sum(errors) / len(errors), softmax(model, pairs)
    output = model(prepared)
    parts = {name: (part.sum / part.count).item() for name, part in output.parts.parts.items()}
    wanted = {"reconstruct/image": mae.item(), "contrast/image-text": contrast.item()}
    assert parts == pytest.approx(wanted, rel=2e-6)
    check(model, output.loss, mae + contrast)
