"""4M's layout, against the model written again with its names and shapes, maps and sequences.

Letters: B samples, n places of a modality, T tokens asked for, L words.
"""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from tokenizers.models import WordPiece
from tokenizers.pre_tokenizers import WhitespaceSplit
from torch import Tensor

from m3 import convert
from m3.errors import M3Error
from m3.random import Draws
from m3.types import MaskPlan
from tests.parity import published_fourm as fourm
from tests.parity.published import (
    assert_equal,
    difference,
    encoded_view,
    pixels,
    randomised,
    tensors_in,
    tokens_of,
)
from tokenizers import Tokenizer


def saved(folder: Path, style: str = "swiglu", is_tied: bool = True) -> fourm.FourM:
    """As the hub keeps it: shared tensors once, the config beside them."""
    theirs = randomised(fourm.FourM(style, is_tied), seed=51)
    once, seen = {}, set()
    for name, x in theirs.state_dict().items():
        if x.data_ptr() not in seen:
            once[name] = x
        seen.add(x.data_ptr())
    save_file(once, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({"domains_in": [], "num_heads": fourm.HEADS}))
    return theirs


def vocabulary(folder: Path, words: list[str] = fourm.WORDS) -> str:
    """A tokenizer.json as theirs."""
    tokenizer = Tokenizer(WordPiece({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    tokenizer.save(str(folder / "words.json"))
    return str(folder / "words.json")


def with_words(folder: Path) -> list[str]:
    return [f"modalities.{name}.vocabulary={vocabulary(folder)}" for name in fourm.SEQUENCES]


VISIBLE = {"rgb@224": [[0, 4, 5], [1, 2, 8]], "tok_rgb@224": [[3], [7]], "tok_depth@224": [[2, 6], [0, 1]]}
VISIBLE |= {"tok_dinov2_global@224": [[4, 1], [0, 2]]}


@pytest.fixture(params=[{}, {"WIDTH": 32, "HEADS": 4, "SIDE": 4, "GLOBAL": 6}], ids=["small", "larger"])
def sizes(request, monkeypatch):
    for name, value in request.param.items():
        monkeypatch.setattr(fourm, name, value)


PRECISIONS = pytest.mark.parametrize(
    ("dtype", "near"), [(torch.float32, 1e-5), (torch.float64, 1e-9)], ids=["float32", "float64"]
)


@PRECISIONS
@pytest.mark.usefixtures("sizes")
@pytest.mark.parametrize("style", fourm.STYLES)
def test_scores_of_hidden_codes_are_theirs(tmp_path: Path, style, dtype, near):
    theirs = saved(tmp_path, style).to(dtype)
    found = convert.convert(tmp_path)
    assert found.format == "fourm"
    assert not found.left
    model = found.model.to(dtype)
    generator = torch.Generator().manual_seed(4)
    signals: dict[str, Tensor] = {
        "rgb@224": model.modalities["rgb@224"].normalise(pixels(2, (fourm.SIDE * fourm.PATCH,) * 2)).to(dtype)
    }
    for name, codes in fourm.CODES.items():
        size = (fourm.GLOBAL, 1) if "global" in name else (fourm.SIDE, fourm.SIDE)
        signals[name] = torch.randint(0, codes, (2, *size), generator=generator)
    visible = {name: torch.tensor(seen).sort(dim=1).values for name, seen in VISIBLE.items()}
    encoded = encoded_view(model, signals, MaskPlan(visible=visible, target={}))
    for name in fourm.CODES:
        count = fourm.GLOBAL if "global" in name else fourm.SIDE**2
        is_hidden = torch.ones(2, count, dtype=torch.bool).scatter(1, visible[name], False)
        asked = torch.stack([row.nonzero()[:, 0] for row in is_hidden])
        own = model.objectives["translate"].predict(name, encoded, tokens_of(model, signals), asked)
        with torch.no_grad():
            expected = theirs(signals, visible, name, asked)
        assert difference(own, expected) < near


@PRECISIONS
@pytest.mark.usefixtures("sizes")
@pytest.mark.parametrize(("style", "is_tied"), [("swiglu", True), ("normed", False), ("gelu", True)])
def test_scores_of_hidden_words_are_theirs(tmp_path: Path, style, is_tied, dtype, near):
    theirs = saved(tmp_path, style, is_tied).to(dtype)
    model = convert.load(tmp_path, ["modalities=tok_depth,caption,det", *with_words(tmp_path)]).to(dtype)
    objective: Any = model.objectives["translate"]
    generator = torch.Generator().manual_seed(6)
    words = {name: torch.randint(14, fourm.ENTRIES, (2, 7), generator=generator) for name in fourm.SEQUENCES}
    words["caption"][1, 5:] = -1  # a shorter one
    codes = torch.randint(0, 7, (2, fourm.SIDE, fourm.SIDE), generator=generator)
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
            read[name], said[name] = fourm.hidden_runs(
                ids[b, :length].tolist(), (~is_visible[name][b, :length]).tolist()
            )
        read = {name: torch.tensor([ids]) for name, ids in read.items() if is_visible[name][b].any()}
        with torch.no_grad():
            context = theirs.context({"tok_depth@224": codes[b : b + 1]}, shown, read)
            for name, every in said.items():
                for i in range(1, len(every)):
                    own = objective._scores(name, outputs[0][b, start[name] + i])
                    assert difference(own[None], theirs.say(context, name, torch.tensor([every[:i]]))) < near


@pytest.mark.parametrize("style", fourm.STYLES)
def test_the_file_comes_back_equal(tmp_path: Path, style):
    theirs = saved(tmp_path, style)
    convert.save(convert.load(tmp_path), tmp_path / "ours", "fourm")
    assert_equal(tensors_in(tmp_path / "ours"), theirs.state_dict())
    config = json.loads((tmp_path / "ours" / "config.json").read_text())
    assert (config["dim"], config["num_heads"], config["encoder_depth"], config["decoder_depth"]) == (24, 3, 2, 3)
    assert (config["qkv_bias"], config["gated_mlp"], config["qk_norm"]) == fourm.STYLES[style]
    assert sorted(config["domains_out"]) == sorted([*fourm.CODES, *fourm.SEQUENCES])
    assert_equal(convert.load(tmp_path / "ours").state_dict(), convert.load(tmp_path).state_dict())


def test_one_file_has_its_config_as_text_which_is_never_run(tmp_path: Path):
    tensors = {name: x.clone() for name, x in saved(tmp_path).state_dict().items()}
    metadata = {
        "num_heads": str(fourm.HEADS),
        "domains_in": "['rgb@224', 'caption']",
        "act_layer": "__import__('os').getcwd()",
    }
    save_file(tensors, tmp_path / "4m.safetensors", metadata=metadata)
    model = convert.load(tmp_path / "4m.safetensors")
    assert model.config.backbone["heads"] == fourm.HEADS
    assert_equal(model.state_dict(), convert.load(tmp_path).state_dict())


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
    save_file(tensors | {"register_tokens": torch.ones(1, 2, fourm.WIDTH)}, tmp_path / "model.safetensors")
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
    unread = {f"decoder_embeddings.{name}.token_emb.weight" for name in fourm.CODES}
    heads = {name: theirs[name.replace("token_emb", "to_logits")] for name in unread}
    assert_equal(tensors_in(tmp_path / "ours"), theirs | heads)


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
    for words in (fourm.WORDS[:-1], [*fourm.WORDS[:5], *(f"w{i}" for i in range(25))]):
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
    assert_equal(tensors_in(tmp_path / "ours"), kept)
    with pytest.raises(M3Error, match=r"modalities names `tok_dept`.*Did you mean `tok_depth`"):
        convert.load(tmp_path, ["modalities=rgb,tok_dept"])
    with pytest.raises(M3Error, match="none of `modalities` is one that it predicts"):
        convert.load(tmp_path, ["modalities=rgb"])


def test_captions_can_be_all_that_is_predicted(tmp_path: Path):
    theirs = saved(tmp_path)
    model = convert.load(tmp_path, ["modalities=rgb,caption"])
    convert.save(model, tmp_path / "ours", "fourm")
    written = tensors_in(tmp_path / "ours")
    assert torch.equal(written["mask_token"], torch.zeros(1, 1, fourm.WIDTH))
    table = "decoder_embeddings.caption.token_emb.weight"
    assert torch.equal(written[table], theirs.state_dict()[table])


def test_what_does_not_fit_is_named_with_the_choice_that_does(tmp_path: Path):
    tensors = {name: x.clone() for name, x in saved(tmp_path).state_dict().items()}
    own = "encoder_embeddings.t5_caption"
    more = {f"{own}.emb_proj.weight": torch.randn(fourm.WIDTH, 16), f"{own}.emb_proj.bias": torch.randn(fourm.WIDTH)}
    more |= {f"{own}.mod_emb": torch.randn(1, 1, fourm.WIDTH), f"{own}.pos_emb": fourm.row()}
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
    learned = {f"encoder_embeddings.det.{name}": x for name, x in (("pos_emb", torch.randn(1, 512, fourm.WIDTH)),)}
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
    omega = 1.0 / (10000.0 ** (torch.arange(fourm.WIDTH // 2, dtype=torch.float32) / (fourm.WIDTH // 2)))
    angle = torch.arange(512, dtype=torch.float32)[:, None] * omega
    rough = torch.cat([angle.sin(), angle.cos()], dim=1).unsqueeze(0)
    changed = {
        f"{side}_embeddings.{name}.pos_emb": rough.clone()
        for side in ("encoder", "decoder")
        for name in fourm.SEQUENCES
    }
    save_file(tensors | changed, tmp_path / "model.safetensors")
    assert convert.load(tmp_path).config.modalities["det"]["type"] == "text"


def test_pixels_of_more_channels_are_read_by_the_size_in_their_name(tmp_path: Path):
    """TerraMind's, whose layout is 4M's."""
    theirs = randomised(fourm.FourM("gelu"), seed=52)
    tensors = {name: x.clone() for name, x in theirs.state_dict().items()}
    weight = torch.randn(fourm.WIDTH, 5 * fourm.PATCH**2, generator=torch.Generator().manual_seed(2))
    for part, x in (("proj.weight", weight), ("pos_emb", fourm.table()), ("mod_emb", torch.randn(1, 1, fourm.WIDTH))):
        tensors[f"encoder_embeddings.untok_sen2@12.{part}"] = x
    save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps({"num_heads": fourm.HEADS}))
    found = convert.convert(tmp_path)
    assert any("mean and std of its 5 channels" in note for note in found.notes)
    values = torch.randn(2, 5, 12, 12, generator=torch.Generator().manual_seed(3))
    tokenizer: Any = found.model.tokenizers["untok_sen2@12"]
    cut = (
        values.unflatten(3, (fourm.SIDE, fourm.PATCH))
        .unflatten(2, (fourm.SIDE, fourm.PATCH))
        .permute(0, 2, 4, 3, 5, 1)
        .flatten(3)
        .flatten(1, 2)
    )
    assert difference(tokenizer.embed(tokenizer.tokenize(values).values), cut @ weight.t()) < 1e-5
    convert.save(found.model, tmp_path / "ours", "fourm")
    assert_equal(tensors_in(tmp_path / "ours"), tensors)
