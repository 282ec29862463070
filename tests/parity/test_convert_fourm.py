"""4M's layout, against the model written again with its names and shapes, maps and sequences.

Letters: B samples, n places of a modality, V tokens seen, T tokens asked for, L words, D width, H hidden width.
"""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from tokenizers.models import WordPiece
from tokenizers.pre_tokenizers import WhitespaceSplit
from torch import Tensor, nn

from m3 import convert
from m3.errors import M3Error
from m3.random import Draws
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
from tokenizers import Tokenizer

WIDTH, HEADS, SIDE, PATCH, GLOBAL = 24, 3, 3, 4, 5
CODES = {"tok_rgb@224": 11, "tok_depth@224": 7, "tok_dinov2_global@224": 9}
ENTRIES, FIRST, END = 30, 5, 3
WORDS = ["[PAD]", "[UNK]", "[SOS]", "[EOS]", *(f"[S_{i}]" for i in range(10)), *(f"v0={i}" for i in range(16))]
"""A small vocabulary like 4M's: sentinels at 4 to 13, words from 14 on."""
SEQUENCES = ("caption", "det")
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

    def at(self, x: Tensor, context: Tensor) -> Tensor:
        """Return the state of the last token alone."""
        return self(x, context)[:, -1:]


def table() -> Tensor:
    """Sines and cosines (1, n, D); the first half of the channels tells the row."""
    omega = 1.0 / 10000 ** (torch.arange(WIDTH // 4, dtype=torch.float64) / (WIDTH // 4))
    angle = torch.arange(SIDE, dtype=torch.float64)[:, None] * omega
    one = torch.cat([angle.sin(), angle.cos()], dim=1).float()
    rows, columns = one[:, None].expand(-1, SIDE, -1), one[None].expand(SIDE, -1, -1)
    return torch.cat([rows, columns], dim=-1).flatten(0, 1).unsqueeze(0)


def row() -> Tensor:
    """Sines and cosines (1, 512, D) of a sequence."""
    omega = 1.0 / 10000 ** (torch.arange(WIDTH // 2, dtype=torch.float64) / (WIDTH // 2))
    angle = torch.arange(512, dtype=torch.float64)[:, None] * omega
    return torch.cat([angle.sin(), angle.cos()], dim=1).float().unsqueeze(0)


class Embedding(nn.Module):
    """Of one modality, on one side."""

    def __init__(self, name: str, is_decoder: bool = False, is_tied: bool = True) -> None:
        super().__init__()
        self.mod_emb = nn.Parameter(torch.zeros(1, 1, WIDTH))
        if name == "tok_dinov2_global@224":
            self.pos_emb = nn.Parameter(torch.zeros(1, GLOBAL, WIDTH))
        else:
            self.register_buffer("pos_emb", row() if name in SEQUENCES else table())
        if name == "rgb@224":
            self.proj = nn.Linear(3 * PATCH**2, WIDTH, bias=False)
            return
        self.token_emb = nn.Embedding(CODES.get(name, ENTRIES), WIDTH)
        if is_decoder:
            self.to_logits = nn.Linear(WIDTH, CODES.get(name, ENTRIES), bias=False)
            if is_tied:
                self.to_logits.weight = self.token_emb.weight

    def forward(self, x: Tensor) -> Tensor:
        """Content of the tokens (B, n, D), of pixels (B, 3, height, width) or codes (B, ...)."""
        if x.is_floating_point():
            cut = x.unflatten(3, (SIDE, PATCH)).unflatten(2, (SIDE, PATCH))  # (B, 3, rows, h, columns, w)
            return self.proj(cut.permute(0, 2, 4, 3, 5, 1).flatten(3).flatten(1, 2))
        return self.token_emb(x.flatten(1))


class FourM(nn.Module):
    def __init__(self, style: str, is_tied: bool = True) -> None:
        super().__init__()
        names = ["rgb@224", *CODES, *SEQUENCES]
        self.encoder_embeddings = nn.ModuleDict({name: Embedding(name) for name in names})
        self.decoder_embeddings = nn.ModuleDict({name: Embedding(name, True, is_tied) for name in names[1:]})
        for name, part in self.decoder_embeddings.items():
            part.mod_emb = self.encoder_embeddings[name].mod_emb
        self.encoder = nn.ModuleList([Block(STYLES[style]) for _ in range(2)])
        self.decoder = nn.ModuleList([DecoderBlock(STYLES[style]) for _ in range(3)])
        self.encoder_norm, self.decoder_norm = Norm(WIDTH, STYLES[style][0]), Norm(WIDTH, STYLES[style][0])
        self.decoder_proj_context = nn.Linear(WIDTH, WIDTH)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, WIDTH))

    def context(
        self, signals: dict[str, Tensor], visible: dict[str, Tensor], words: dict[str, Tensor] | None = None
    ) -> Tensor:
        """What the decoder reads (B, V, D), of tokens and of `words` (B, L), sentinels among them."""
        tokens, marks = [], []
        for own, x in signals.items():
            part = self.encoder_embeddings[own]
            mark = (part.pos_emb + part.mod_emb).expand(len(x), -1, -1)
            tokens.append(rows(part(x), visible[own]))
            marks.append(rows(mark, visible[own]))
        for own, ids in (words or {}).items():
            part = self.encoder_embeddings[own]
            tokens.append(part.token_emb(ids))
            marks.append((part.pos_emb[:, : ids.shape[1]] + part.mod_emb).expand(len(ids), -1, -1))
        x, mark = torch.cat(tokens, dim=1), torch.cat(marks, dim=1)
        x = x + mark
        for block in self.encoder:
            x = block(x)
        return self.decoder_proj_context(self.encoder_norm(x)) + mark

    def forward(self, signals: dict[str, Tensor], visible: dict[str, Tensor], name: str, asked: Tensor) -> Tensor:
        """Scores (B, T, codes) of one modality's tokens asked for."""
        x = context = self.context(signals, visible)
        part = self.decoder_embeddings[name]
        y = self.mask_token + rows((part.pos_emb + part.mod_emb).expand(len(x), -1, -1), asked)
        for block in self.decoder:
            y = block(y, context)
        return part.to_logits(self.decoder_norm(y))

    def say(self, context: Tensor, name: str, said: Tensor) -> Tensor:
        """Scores (1, entries) of the word behind `said` (1, L); the last place alone sees all of them."""
        part = self.decoder_embeddings[name]
        states = part.token_emb(said) + part.pos_emb[:, : said.shape[1]] + part.mod_emb
        for block in self.decoder:  # word by word, so that none sees those behind it
            states = torch.cat([block.at(states[:, : i + 1], context) for i in range(states.shape[1])], dim=1)
        return part.to_logits(self.decoder_norm(states[:, -1]))


def hidden_runs(words: list[int], is_hidden: list[bool]) -> tuple[list[int], list[int]]:
    """What the encoder reads and what the decoder says: each hidden run is a sentinel, counted from [S_1]."""
    read, said, count, before = [], [], 0, False
    for word, hidden in zip(words, is_hidden, strict=True):
        if hidden and not before:
            read.append(FIRST + count)
            said.append(FIRST + count)
            count += 1
        (said if hidden else read).append(word)
        before = hidden
    return read, [*said, FIRST + count]


def rows(x: Tensor, index: Tensor) -> Tensor:
    return torch.stack([row[chosen] for row, chosen in zip(x, index, strict=True)])


def saved(folder: Path, style: str = "swiglu", is_tied: bool = True) -> FourM:
    """As the hub keeps it: shared tensors once, the config beside them."""
    theirs = randomise(FourM(style, is_tied), seed=51)
    once, seen = {}, set()
    for name, x in theirs.state_dict().items():
        if x.data_ptr() not in seen:
            once[name] = x
        seen.add(x.data_ptr())
    save_file(once, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({"domains_in": [], "num_heads": HEADS}))
    return theirs


def vocabulary(folder: Path, words: list[str] = WORDS) -> str:
    """A tokenizer.json as theirs."""
    tokenizer = Tokenizer(WordPiece({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    tokenizer.save(str(folder / "words.json"))
    return str(folder / "words.json")


def with_words(folder: Path) -> list[str]:
    return [f"modalities.{name}.vocabulary={vocabulary(folder)}" for name in SEQUENCES]


VISIBLE = {"rgb@224": [[0, 4, 5], [1, 2, 8]], "tok_rgb@224": [[3], [7]], "tok_depth@224": [[2, 6], [0, 1]]}
VISIBLE |= {"tok_dinov2_global@224": [[4, 1], [0, 2]]}


@pytest.mark.parametrize(("dtype", "near"), [(torch.float32, 1e-5), (torch.float64, 1e-9)], ids=["float32", "float64"])
@pytest.mark.parametrize("style", STYLES)
def test_scores_of_hidden_codes_are_theirs(tmp_path: Path, style, dtype, near):
    theirs = saved(tmp_path, style).to(dtype)
    found = convert.convert(tmp_path)
    assert found.format == "fourm"
    assert not found.left
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


@pytest.mark.parametrize("is_tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("style", STYLES)
def test_scores_of_hidden_words_are_theirs(tmp_path: Path, style, is_tied):
    theirs = saved(tmp_path, style, is_tied).double()
    model = convert.load(tmp_path, ["modalities=tok_depth,caption,det", *with_words(tmp_path)]).double()
    objective: Any = model.objectives["translate"]
    generator = torch.Generator().manual_seed(6)
    words = {name: torch.randint(14, ENTRIES, (2, 7), generator=generator) for name in SEQUENCES}
    words["caption"][1, 5:] = -1  # a shorter one
    codes = torch.randint(0, 7, (2, SIDE, SIDE), generator=generator)
    tokens = tokens_of(model, {"tok_depth@224": codes, **words})
    is_visible = {name: torch.rand(2, x.count, generator=generator) > 0.5 for name, x in tokens.items()}
    is_visible["det"][0] = False  # nothing of it is read
    (selection,) = model.views.values()
    plan = selection.explicit(tokens, is_visible, Draws(torch.arange(2)))
    outputs: list[Tensor] = []
    objective.decoder.register_forward_hook(lambda module, given, x: outputs.append(x))
    with torch.no_grad():
        objective({objective.view: model.encode_tokens(tokens, plan)}, tokens)
    start = dict(
        zip(plan.target, torch.tensor([0, *(x.shape[1] for x in plan.target.values())]).cumsum(0), strict=False)
    )
    for b in range(2):
        shown = {"tok_depth@224": is_visible["tok_depth@224"][b].nonzero().t()}
        read, said = {}, {}
        for name, ids in words.items():
            length = int((ids[b] >= 0).sum())
            read[name], said[name] = hidden_runs(ids[b, :length].tolist(), (~is_visible[name][b, :length]).tolist())
        read = {name: torch.tensor([ids]) for name, ids in read.items() if is_visible[name][b].any()}
        with torch.no_grad():
            context = theirs.context({"tok_depth@224": codes[b : b + 1]}, shown, read)
            for name, every in said.items():
                for i in range(1, len(every)):
                    own = objective._scores(name, outputs[0][b, start[name] + i])
                    assert difference(own[None], theirs.say(context, name, torch.tensor([every[:i]]))) < 1e-9


@pytest.mark.parametrize("style", STYLES)
def test_the_file_comes_back_equal(tmp_path: Path, style):
    theirs = saved(tmp_path, style)
    convert.save(convert.load(tmp_path), tmp_path / "ours", "fourm")
    assert_same_tensors(tensors_in(tmp_path / "ours"), theirs.state_dict())
    config = json.loads((tmp_path / "ours" / "config.json").read_text())
    assert (config["dim"], config["num_heads"], config["encoder_depth"], config["decoder_depth"]) == (24, 3, 2, 3)
    assert (config["qkv_bias"], config["gated_mlp"], config["qk_norm"]) == STYLES[style]
    assert sorted(config["domains_out"]) == sorted([*CODES, *SEQUENCES])
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


def test_heads_of_their_own_come_back_equal_but_for_embeddings_that_nothing_reads(tmp_path: Path):
    theirs = saved(tmp_path, is_tied=False).state_dict()
    model = convert.load(tmp_path)
    assert model.config.objectives["translate"]["tied"] is False
    convert.save(model, tmp_path / "ours", "fourm")
    unread = {f"decoder_embeddings.{name}.token_emb.weight" for name in CODES}
    heads = {name: theirs[name.replace("token_emb", "to_logits")] for name in unread}
    assert_same_tensors(tensors_in(tmp_path / "ours"), theirs | heads)


def test_words_have_the_ids_of_the_vocabulary_that_is_given(tmp_path: Path):
    saved(tmp_path)
    found = convert.convert(tmp_path, with_words(tmp_path))
    caption: Any = found.model.modalities["caption"]
    assert caption.to_raw("v0=2 v0=0").tolist() == [16, 14, 3]
    assert (caption.spec.sentinels, caption.spec.length, caption.signal.sentinel_ids) == (9, 256, range(5, 14))
    assert not any("vocabulary" in note for note in found.notes)
    assert found.model.config.modalities["caption"]["vocabulary"].startswith("tokenizers:")
    assert found.model.config.objectives["translate"]["masking"]["counted"] is True


def test_without_a_vocabulary_words_are_numbers(tmp_path: Path):
    saved(tmp_path)
    found = convert.convert(tmp_path)
    caption: Any = found.model.modalities["caption"]
    assert caption.to_raw("17 29").tolist() == [17, 29, 3]
    assert caption.signal.sentinel_ids == range(5, 30)
    assert any("give modalities.caption.vocabulary=TOKENIZER.json" in note for note in found.notes)


def test_another_vocabulary_is_refused(tmp_path: Path):
    saved(tmp_path)
    for words in (WORDS[:-1], [*WORDS[:5], *(f"w{i}" for i in range(25))]):
        with pytest.raises(M3Error, match=r"modalities\.det\.vocabulary is not 4M's: there must be 30 entries"):
            convert.load(tmp_path, [f"modalities.det.vocabulary={vocabulary(tmp_path, words)}"])


def test_a_choice_of_modalities_leaves_the_others_out_by_name(tmp_path: Path):
    theirs = saved(tmp_path)
    found = convert.convert(tmp_path, ["modalities=rgb,tok_rgb@224"])
    assert list(found.model.modalities) == ["rgb@224", "tok_rgb@224"]
    parts = {"caption", "det", "tok_depth@224", "tok_dinov2_global@224"}
    assert {name.split(".")[1] for name in found.left} == parts
    assert set(found.left.values()) == {"it was not chosen"}
    kept = {name: x for name, x in theirs.state_dict().items() if not set(name.split(".")) & parts}
    convert.save(found.model, tmp_path / "ours", "fourm")
    assert_same_tensors(tensors_in(tmp_path / "ours"), kept)
    with pytest.raises(M3Error, match=r"modalities names `tok_dept`.*Did you mean `tok_depth`"):
        convert.load(tmp_path, ["modalities=rgb,tok_dept"])
    with pytest.raises(M3Error, match="none of `modalities` is one that it predicts"):
        convert.load(tmp_path, ["modalities=rgb"])


def test_captions_can_be_all_that_is_predicted(tmp_path: Path):
    theirs = saved(tmp_path)
    model = convert.load(tmp_path, ["modalities=rgb,caption"])
    convert.save(model, tmp_path / "ours", "fourm")
    written = tensors_in(tmp_path / "ours")
    assert torch.equal(written["mask_token"], torch.zeros(1, 1, WIDTH))
    table = "decoder_embeddings.caption.token_emb.weight"
    assert torch.equal(written[table], theirs.state_dict()[table])


def test_what_does_not_fit_is_named_with_the_choice_that_does(tmp_path: Path):
    tensors = {name: x.clone() for name, x in saved(tmp_path).state_dict().items()}
    own = "encoder_embeddings.t5_caption"
    more = {f"{own}.emb_proj.weight": torch.randn(WIDTH, 16), f"{own}.emb_proj.bias": torch.randn(WIDTH)}
    more |= {f"{own}.mod_emb": torch.randn(1, 1, WIDTH), f"{own}.pos_emb": row()}
    save_file(tensors | more, tmp_path / "model.safetensors")
    every = "rgb@224,tok_rgb@224,tok_depth@224,tok_dinov2_global@224,caption,det"
    with pytest.raises(M3Error, match=r"`t5_caption` does not fit: a sequence of embeddings") as caught:
        convert.load(tmp_path)
    choice = str(caught.value).split()[-1]
    assert sorted(choice.removeprefix("modalities=").split(",")) == sorted(every.split(","))
    found = convert.convert(tmp_path, [choice])
    assert set(found.left) == set(more)
    assert set(found.left.values()) == {"a sequence of embeddings instead of words, for which there is no modality"}
    with pytest.raises(M3Error, match=r"`t5_caption` does not fit: .* Leave it out of `modalities`"):
        convert.load(tmp_path, ["modalities=rgb,caption,t5_caption"])
    alone = {name: x for name, x in tensors.items() if name != "encoder_embeddings.det.token_emb.weight"}
    gone = {name: x for name, x in alone.items() if not name.startswith("encoder_embeddings.det.")}
    save_file(gone, tmp_path / "model.safetensors")
    with pytest.raises(M3Error, match="`det` does not fit: it is predicted and not read"):
        convert.load(tmp_path)
    learned = {f"encoder_embeddings.det.{name}": x for name, x in (("pos_emb", torch.randn(1, 512, WIDTH)),)}
    save_file(tensors | learned, tmp_path / "model.safetensors")
    with pytest.raises(M3Error, match="`det` does not fit: a sequence with learned positions"):
        convert.load(tmp_path)


def test_a_map_whose_head_is_not_its_embedding_is_read_by_its_head(tmp_path: Path):
    tensors = {name: x.clone() for name, x in saved(tmp_path).state_dict().items()}
    head = "decoder_embeddings.tok_depth@224.to_logits.weight"
    save_file(tensors | {head: tensors[head] + 1}, tmp_path / "model.safetensors")
    found = convert.convert(tmp_path)
    assert torch.equal(found.model.state_dict()["objectives.translate.heads.tok_depth@224.weight"], tensors[head] + 1)
    assert any("tok_depth@224.token_emb is another than its head" in note for note in found.notes)


def test_positions_of_a_sequence_are_known_when_they_are_made_in_float32(tmp_path: Path):
    tensors = {name: x.clone() for name, x in saved(tmp_path).state_dict().items()}
    omega = 1.0 / (10000.0 ** (torch.arange(WIDTH // 2, dtype=torch.float32) / (WIDTH // 2)))
    angle = torch.arange(512, dtype=torch.float32)[:, None] * omega
    rough = torch.cat([angle.sin(), angle.cos()], dim=1).unsqueeze(0)
    changed = {
        f"{side}_embeddings.{name}.pos_emb": rough.clone() for side in ("encoder", "decoder") for name in SEQUENCES
    }
    save_file(tensors | changed, tmp_path / "model.safetensors")
    assert convert.load(tmp_path).config.modalities["det"]["type"] == "text"


def test_pixels_of_more_channels_are_read_by_the_size_in_their_name(tmp_path: Path):
    """TerraMind's, whose layout is 4M's."""
    theirs = randomise(FourM("gelu"), seed=52)
    tensors = {name: x.clone() for name, x in theirs.state_dict().items()}
    weight = torch.randn(WIDTH, 5 * PATCH**2, generator=torch.Generator().manual_seed(2))
    for part, x in (("proj.weight", weight), ("pos_emb", table()), ("mod_emb", torch.randn(1, 1, WIDTH))):
        tensors[f"encoder_embeddings.untok_sen2@12.{part}"] = x
    save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps({"num_heads": HEADS}))
    found = convert.convert(tmp_path)
    assert any("mean and std of its 5 channels" in note for note in found.notes)
    values = torch.randn(2, 5, 12, 12, generator=torch.Generator().manual_seed(3))
    tokenizer: Any = found.model.tokenizers["untok_sen2@12"]
    cut = (
        values.unflatten(3, (SIDE, PATCH))
        .unflatten(2, (SIDE, PATCH))
        .permute(0, 2, 4, 3, 5, 1)
        .flatten(3)
        .flatten(1, 2)
    )
    assert difference(tokenizer.embed(tokenizer.tokenize(values).values), cut @ weight.t()) < 1e-5
    convert.save(found.model, tmp_path / "ours", "fourm")
    assert_same_tensors(tensors_in(tmp_path / "ours"), tensors)
