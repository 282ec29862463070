"""MultiMAE written a second time, token by token from the paper's description, with words as one modality more.

A token is named by its modality and its number, as in ("depth", 3). Letters: N tokens, D width.
"""

import math

import torch
from torch import Tensor

from m3.model import M3Model
from m3.types import Batch
from tests.parity.slow_vit import Slow, patches, position, recipe_model

ROWS, COLUMNS = 2, 3
TOKENS = ROWS * COLUMNS
PATCHES = {"image": 4, "depth": 4, "semantic": 2}
CLASSES, CLASS_WIDTH, UNLABELLED = 5, 6, 255
WIDTH, HEADS, DEPTH = 16, 2, 2
DECODER_WIDTH, DECODER_HEADS, DECODER_DEPTH = 8, 2, 1
WORDS, LENGTH = "[a, b, c, d, e]", 7
TARGETS = {
    "image": ("image", "mse"),
    "image_normalised": ("image", "mse"),
    "depth": ("depth", "l1"),
    "semantic": ("semantic", "cross_entropy"),
    "text": ("text", "cross_entropy"),
}
"""Target -> the modality that it belongs to, and its loss."""

Token = tuple[str, int]


def build_model(recipe: str, has_gaps: bool = False) -> M3Model:
    """A recipe of MultiMAE, with or without words, at a small size."""
    changes = [f"modalities.{name}.size={[ROWS * size, COLUMNS * size]}" for name, size in PATCHES.items()]
    changes += [f"modalities.{name}.tokenizer.size={size}" for name, size in PATCHES.items()]
    semantic = "modalities.semantic"
    changes += [f"{semantic}.classes={CLASSES}", f"{semantic}.tokenizer.class_width={CLASS_WIDTH}"]
    changes += [f"backbone.width={WIDTH}", f"backbone.depth={DEPTH}", f"backbone.heads={HEADS}"]
    decoder = {"width": DECODER_WIDTH, "depth": DECODER_DEPTH, "heads": DECODER_HEADS}
    changes += [f"objectives.reconstruct.decoder.{key}={value}" for key, value in decoder.items()]
    changes.append("objectives.reconstruct.masking.visible=6")
    if has_gaps:
        changes += [f"{semantic}.ignore={UNLABELLED}", "modalities.depth.missing=0"]
    if "text" in recipe:
        changes += [f"modalities.text.vocabulary={WORDS}", f"modalities.text.length={LENGTH}"]
    return recipe_model(recipe, changes)


def truncated_standardise(values: Tensor) -> Tensor:
    """One map, any shape: by mean and unbiased variance of its known values without the lowest and highest tenth."""
    known = sorted(x for x in values.double().flatten().tolist() if not math.isnan(x))
    middle = known[len(known) // 10 : len(known) * 9 // 10]
    mean = sum(middle) / len(middle)
    variance = sum((x - mean) ** 2 for x in middle) / (len(middle) - 1)
    return (values.double() - mean) / math.sqrt(variance + 1e-6)


def standardised(values: list[float]) -> list[float]:
    """One patch, by mean and unbiased variance of all its pixels (He et al. 2021)."""
    mean = sum(values) / len(values)
    variance = sum((x - mean) ** 2 for x in values) / (len(values) - 1)
    return [(x - mean) / math.sqrt(variance + 1e-6) for x in values]


class SlowMultiMAE(Slow):
    """One sample at a time; a list of tokens says which rows of a sequence are which."""

    def __init__(self, model: M3Model, batch: Batch) -> None:
        super().__init__(dict(model.named_parameters()))
        self.is_present = batch.is_present
        self.targets = {name: target for name, target in TARGETS.items() if target[0] in batch.signals}
        self.image = [patches(pixels, PATCHES["image"]).tolist() for pixels in batch.signals["image"]]
        self.depth = [truncated_standardise(x) for x in batch.signals["depth"]]
        self.semantic = batch.signals["semantic"]
        self.words = [[k for k in row if k >= 0] for row in batch.signals.get("text", torch.empty(0)).tolist()]

    def tokens(self, sample: int) -> list[Token]:
        """All that the sample has: six patches of a map, as many words as its text is long."""
        found = []
        for name in dict.fromkeys(modality for modality, _ in self.targets.values()):
            if name not in self.is_present or self.is_present[name][sample]:
                count = len(self.words[sample]) if name == "text" else TOKENS
                found += [(name, number) for number in range(count)]
        return found

    def values(self, sample: int, token: Token) -> list[float]:
        """What one token holds: pixels (channel, row, column), depths, or ids (-1 unknown)."""
        name, number = token
        if name == "text":
            return [self.words[sample][number]]
        if name == "image":
            return self.image[sample][number]
        row, column = divmod(number, COLUMNS)
        size, values = PATCHES[name], []
        for i in range(row * size, (row + 1) * size):
            for j in range(column * size, (column + 1) * size):
                if name == "depth":
                    values.append(float(self.depth[sample][i, j]))
                else:
                    value = int(self.semantic[sample, i, j])
                    values.append(-1 if value == UNLABELLED else value)
        return values

    def place(self, token: Token, where: str, width: int) -> Tensor:
        """Where a token is: learned for words; else the row in the first half of the channels, the column behind."""
        name, number = token
        if name == "text":
            return self.p[f"{where}positions.text.table"][:, number]
        column, row = position(number, COLUMNS, width).chunk(2)
        return torch.cat([row, column])

    def embed(self, sample: int, token: Token) -> Tensor:
        name, values = token[0], self.values(sample, token)
        if name == "text":
            x = self.p["tokenizers.text.table.weight"][int(values[0])]
        else:
            if name == "semantic":
                table = self.p["tokenizers.semantic.class_embedding.weight"]
                x = torch.cat([table[CLASSES if value < 0 else int(value)] for value in values])
            else:
                x = torch.tensor([0.0 if math.isnan(v) else v for v in values], dtype=torch.float64)
            x = self.p[f"tokenizers.{name}.projection.weight"] @ x + self.p[f"tokenizers.{name}.projection.bias"]
        return x + self.place(token, "", WIDTH)

    def see(self, sample: int, visible: list[Token]) -> Tensor:
        """The global token's state first, then those of the visible tokens in the given order; no final norm."""
        x = torch.stack([self.embed(sample, token) for token in visible])
        assert "backbone.norm.weight" not in self.p
        return self.encode(x, HEADS, DEPTH)[1]

    def decode(self, target: str, states: Tensor, visible: list[Token], asked: list[Token]) -> Tensor:
        """Predict all tokens of one modality, `asked`."""
        d = f"objectives.reconstruct.decoders.{target}"
        states = self.linear(f"{d}.context", states)

        def mark(token: Token) -> Tensor:
            named = "" if token[0] != "text" else f"{d}."
            return self.place(token, named, DECODER_WIDTH) + self.p[f"{d}.modality_embeddings.{token[0]}"][0]

        context = [states[0]] + [x + mark(token) for x, token in zip(states[1:], visible, strict=True)]
        queries = []
        for token in asked:
            x = states[1 + visible.index(token)] if token in visible else self.p[f"{d}.mask_token"][0]
            queries.append(x + mark(token))
        queries = self.norm(f"{d}.query_norm", torch.stack(queries))
        context = self.norm(f"{d}.context_norm", torch.stack(context))
        x = self.cross_attention(f"{d}.attention", queries, context, DECODER_HEADS)  # no residual
        x = x + self.mlp(f"{d}.mlp", self.norm(f"{d}.norm", x))
        for number in range(DECODER_DEPTH):
            x = self.block(f"{d}.blocks.{number}", x, DECODER_HEADS)
        return self.linear(f"{d}.output", x)

    def token_losses(self, target: str, predicted: Tensor, values: list[float]) -> list[Tensor]:
        """Losses of the known values of one token."""
        name, loss = self.targets[target]
        if target == "image_normalised":
            values = standardised(values)
        losses, width = [], len(predicted) // len(values)
        for i, value in enumerate(values):
            if math.isnan(value) or (name == "semantic" and value < 0):
                continue
            guess = predicted[i * width : (i + 1) * width]
            if loss == "cross_entropy":
                losses.append(torch.exp(guess).sum().log() - guess[int(value)])
            else:
                error = guess[0] - value
                losses.append(error**2 if loss == "mse" else error.abs())
        return losses

    def loss(self, visible: list[list[Token]]) -> tuple[dict[str, Tensor], dict[str, int]]:
        """Per target: the mean within each sample, then over the samples that have any hidden known value."""
        encoded = [self.see(sample, seen) for sample, seen in enumerate(visible)]
        means, counts = {}, {}
        for target, (name, _) in self.targets.items():
            samples = []
            for sample, seen in enumerate(visible):
                own = [token for token in self.tokens(sample) if token[0] == name]
                if all(token in seen for token in own):
                    continue
                losses = []
                for token, guess in zip(own, self.decode(target, encoded[sample], seen, own), strict=True):
                    if token not in seen:
                        losses += self.token_losses(target, guess, self.values(sample, token))
                if losses:
                    samples.append(sum(losses) / len(losses))
            means[target], counts[target] = sum(samples) / len(samples), len(samples)
        return means, counts
