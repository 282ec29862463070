"""Whole words: which ids of a vocabulary make one word, and how their numbers reach the masking."""

import io
import json
from pathlib import Path

import pytest
import torch
from torch import Tensor

from m3.config import M3Config
from m3.data.words import describe, open_vocabulary, train_vocabulary
from m3.errors import M3Error
from m3.modalities.boxes import Boxes
from m3.modalities.text import Text
from m3.model import M3Model
from m3.network import build_modalities, resolved
from m3.processor import M3Processor
from m3.testing import check_modality
from m3.testing.tokenizer import build_tokenizer

CORPUS = ["a red cube is left of a small green sphere", "the large blue cone, behind two yellow cylinders"] * 10
SENTENCES = [CORPUS[0], "a sphere and cylinders", "smaller reddish cubes, behind it", "猫 red"]


def text(vocabulary: str | list[str], **settings) -> Text:
    return build_modalities({"x": {"type": "text", "vocabulary": vocabulary, **settings}})["x"]  # type: ignore[return-value]


def written(tmp_path: Path, kind: str) -> str:
    if kind == "open_clip":
        pytest.importorskip("open_clip", reason="needs open_clip")
        return "open_clip:"
    if kind == "sentencepiece":
        model = io.BytesIO()
        pytest.importorskip("sentencepiece", reason="needs sentencepiece").SentencePieceTrainer.train(
            sentence_iterator=iter(CORPUS), model_writer=model, vocab_size=40, hard_vocab_limit=False, minloglevel=2
        )
        (tmp_path / "sp.model").write_bytes(model.getvalue())
        return str(tmp_path / "sp.model")
    # Few merges, so that words are cut into several pieces.
    size = {"wordpiece": 50, "bpe": 280}[kind]
    (tmp_path / "v.json").write_text(train_vocabulary(CORPUS, size, kind), encoding="utf-8")
    return str(tmp_path / "v.json")


def words_of(part: Text, ids: Tensor) -> list[list[int]]:
    """Ids (L,) of each group, in order; fails if the numbers of the groups are not 0, 1, 2 ..."""
    numbers = part.groups(ids[None])[0].tolist()
    assert sorted(set(numbers)) == list(range(max(numbers) + 1))
    return [[int(i) for i, n in zip(ids, numbers, strict=True) if n == word] for word in range(max(numbers) + 1)]


@pytest.mark.parametrize("kind", ["wordpiece", "bpe", "sentencepiece", "open_clip"])
def test_the_pieces_of_a_word_make_one_group(kind: str, tmp_path: Path) -> None:
    """Decoded one by one, the groups are the words; punctuation may stand alone, or with its word."""
    part = text(written(tmp_path, kind))
    pieces = 0
    for sentence in SENTENCES[:3]:
        found = words_of(part, part.to_raw(sentence).long())
        pieces += sum(len(ids) > 1 for ids in found)
        decoded = [part.vocabulary.decode(ids).replace("##", "").strip() for ids in found]
        apart = kind in ("wordpiece", "open_clip")
        assert decoded == (sentence.replace(",", " ,") if apart else sentence).split()
    assert pieces > 2 or kind == "open_clip", "a test of words that are all in the vocabulary tests nothing"


def test_clip_s_groups_by_hand() -> None:
    """ "reddish" is red + dish</w>; an end of word stands behind it, not in front."""
    pytest.importorskip("open_clip", reason="needs open_clip")
    part = text("open_clip:")
    ids = part.vocabulary.encode("a smallish qwrtz photo")
    assert len(ids) > 4
    groups = part.groups(torch.tensor([ids]))[0]
    assert [part.vocabulary.decode([i for i, g in zip(ids, groups, strict=True) if g == n]) for n in range(4)] == [
        "a",
        "smallish",
        "qwrtz",
        "photo",
    ]


def wordpiece(tmp_path: Path, model: dict, added: tuple[dict, ...] = ()) -> Text:
    whole = {"version": "1.0", "added_tokens": list(added), "model": model, "pre_tokenizer": {"type": "Whitespace"}}
    for key in ("truncation", "padding", "normalizer", "post_processor", "decoder"):
        whole[key] = None
    (tmp_path / "t.json").write_text(json.dumps(whole))
    return text(str(tmp_path / "t.json"))


def test_wordpiece_by_hand(tmp_path: Path) -> None:
    vocabulary = {"[UNK]": 0, "red": 1, "##dish": 2, "##es": 3, "cube": 4, "[SEP]": 5}
    model = {
        "type": "WordPiece",
        "unk_token": "[UNK]",
        "continuing_subword_prefix": "##",
        "max_input_chars_per_word": 100,
        "vocab": vocabulary,
    }
    special = {"id": 5, "content": "[SEP]", "single_word": False, "lstrip": False, "rstrip": False}
    part = wordpiece(tmp_path, model, ({**special, "normalized": False, "special": True},))
    begins, ends = part.vocabulary.word_edges()
    assert begins == [True, True, False, False, True, True]
    assert ends == [False, False, False, False, False, True]
    ids = torch.tensor([[1, 2, 3, 4, 0, -1, -1], [2, 3, 5, 2, 1, 3, 4]])
    assert part.groups(ids).tolist() == [[0, 0, 0, 1, 2, 3, 4], [0, 0, 1, 2, 3, 3, 4]]


def test_whole_words_of_a_list_stand_alone(tmp_path: Path) -> None:
    assert text(["a", "red"]).groups(torch.tensor([[1, 1, 2, 0, -1, -1]])).tolist() == [[0, 1, 2, 3, 4, 5]]
    model = {"type": "WordLevel", "vocab": {"[UNK]": 0, "red": 1, "▁x": 2}, "unk_token": "[UNK]"}
    assert wordpiece(tmp_path, model).groups(torch.tensor([[1, 2, 1, 0]])).tolist() == [[0, 1, 2, 3]]


def test_a_box_is_one_group() -> None:
    part = build_modalities({"b": {"type": "boxes", "labels": ["a"], "count": 2}})["b"]
    assert isinstance(part, Boxes)
    assert part.groups(torch.arange(20).reshape(2, 10)).tolist() == [[0] * 5 + [1] * 5] * 2


# -- sentinels ------------------------------------------------------------------------------------------


def test_sentinels_are_ids_behind_the_vocabulary() -> None:
    part = text(["a", "red", "cube"], length=6, sentinels=3)
    assert part.signal.classes == 4 + 3
    assert [part.sentinel(n) for n in range(3)] == [4, 5, 6]
    assert part.decode([1, 2, 4, 3, 5, 6, -1, -1]) == "a red <S0> cube <S1> <S2>"
    assert part.decode([]) == ""
    assert part.to_raw("a <S0> cube").tolist() == [1, 0, 3], "a text that spells a sentinel is a text"
    assert part.groups(torch.tensor([[1, 4, 5, 2, -1, -1]])).tolist() == [[0, 1, 2, 3, 4, 5]]
    assert (part.show(torch.tensor([1, 4, 2])) != part.show(torch.tensor([1, 5, 2]))).any()
    for number in (3, -1):
        with pytest.raises(M3Error, match=rf"^a text has no sentinel {number}: there are 3, numbered from 0; raise `s"):
            part.sentinel(number)
    with pytest.raises(M3Error, match=r"^a text holds id 4, but the vocabulary has 4 entries.$"):
        part.to_raw(torch.tensor([1, 4]).numpy())


def test_sentinels_may_be_entries_of_the_vocabulary_itself() -> None:
    part = text(["s", "t", "a", "red", "cube"], length=6, sentinels=2, first_sentinel=1)
    assert part.signal.classes == 6
    assert part.signal.sentinel_ids == range(1, 3)
    assert [part.sentinel(n) for n in range(2)] == [1, 2]
    assert part.decode([3, 4, 1, 5, 2, -1]) == "a red <S0> cube <S1>"
    assert part.groups(torch.tensor([[3, 1, 5, -1]])).tolist() == [[0, 1, 2, 3]]
    tokenizer = build_tokenizer({"type": "embedding"}, part.signal)
    assert tokenizer.tokenize(torch.tensor([[3, 5]])).sentinels == range(1, 3)
    scores = torch.eye(6)[[0, 1, 2, 3, 5]].unsqueeze(0)
    assert tokenizer.decode(scores).squeeze(-1).tolist() == [[0, -1, -1, 3, 5]]
    with pytest.raises(
        M3Error, match=r"^text.first_sentinel: 2 sentinels from id 5 on do not lie in a vocabulary of 6"
    ):
        text(["s", "t", "a", "red", "cube"], sentinels=2, first_sentinel=5)
    with pytest.raises(M3Error, match=r"^the modality says where its sentinels are; remove those of the tokenizer"):
        build_tokenizer({"type": "embedding", "sentinels": 1}, part.signal)


def test_a_sentinel_divides_a_word(tmp_path: Path) -> None:
    part = text(written(tmp_path, "wordpiece"), sentinels=2)
    ids = part.to_raw("cylinders").tolist()
    assert len(ids) > 3
    whole = [*ids[:2], part.sentinel(1), *ids[2:]]
    assert part.decode(whole).startswith(part.vocabulary.decode(ids[:2]) + " <S1> ")
    assert part.groups(torch.tensor([whole])).tolist() == [[0, 0, 1] + [2] * (len(ids) - 2)]
    assert text(written(tmp_path, "wordpiece")).signal.classes == part.signal.classes - 2


def test_a_text_with_sentinels_keeps_its_contract() -> None:
    samples = ["a red cube", "a cube a", "red red red cube"]
    settings = {"type": "text", "vocabulary": ["a", "red", "cube"], "length": 6, "sentinels": 4}
    check_modality(settings, samples, {"type": "embedding"})


# -- in a model -----------------------------------------------------------------------------------------


def model_of(vocabulary: str, masking: dict) -> M3Model:
    settings = {"type": "text", "vocabulary": vocabulary, "length": 24, "tokenizer": {"type": "embedding"}}
    return M3Model(
        M3Config(
            modalities={"text": resolved(settings, "modalities.text")},
            backbone={"width": 32, "depth": 1, "heads": 2},
            objectives={
                "reconstruct": {
                    "type": "reconstruct",
                    "masking": masking,
                    "decoder": {"type": "self_decoder", "width": 32, "depth": 1, "heads": 2},
                    "targets": {"text": {"loss": "cross_entropy"}},
                }
            },
            seed=0,
        )
    )


@pytest.mark.parametrize("kind", ["fixed", "dirichlet"])
def test_the_model_never_sees_a_part_of_a_word(kind: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = model_of(written(tmp_path, "wordpiece"), {"type": kind, "visible": 0.5, "whole": True})
    batch = M3Processor(model.config.modalities)(text=SENTENCES * 8)
    prepared = model.prepare(batch)
    tokens, (plan,) = prepared.tokens["text"], prepared.plans.values()
    assert tokens.group is not None
    assert plan.is_valid is not None
    is_cut = 0
    for row in range(len(batch)):
        seen = set(plan.packed_index()[row, plan.is_valid[row]].tolist())
        for word in range(tokens.count):
            own = set((tokens.group[row] == word).nonzero().flatten().tolist())
            assert not own & seen or own <= seen
            is_cut += len(own) > 1 and own <= seen
    assert is_cut > 10
    loss = model(prepared).loss
    loss.backward()
    assert loss.isfinite()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)


def test_a_sentence_whose_words_are_longer_than_the_budget_is_not_seen_at_all(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = model_of(written(tmp_path, "wordpiece"), {"type": "fixed", "visible": 1, "whole": True})
    batch = M3Processor(model.config.modalities)(text=["cylinders", "a"])
    prepared = model.prepare(batch)
    (plan,) = prepared.plans.values()
    assert plan.is_valid is not None
    assert plan.is_valid.tolist() == [[False], [True]]
    loss = model(prepared).loss
    loss.backward()
    assert loss.isfinite()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)


def test_an_absent_sentence_keeps_its_place(tmp_path: Path) -> None:
    model = model_of(written(tmp_path, "wordpiece"), {"type": "fixed", "visible": 0.5, "whole": True})
    tokens = model.tokenise(M3Processor(model.config.modalities)(text=["smallish cubes", None]))["text"]
    assert tokens.group is not None
    assert tokens.is_valid is not None
    assert tokens.group.shape == tokens.is_valid.shape
    assert not tokens.is_valid[1].any()


class Halves(Text):
    """A text whose groups are not of its positions."""

    def groups(self, signal: Tensor) -> Tensor:
        """Number the first half of the positions."""
        return super().groups(signal)[:, ::2]


def test_groups_of_something_else_than_tokens_are_refused(tmp_path: Path) -> None:
    model = model_of(written(tmp_path, "wordpiece"), {"type": "fixed"})
    model.modalities["text"].__class__ = Halves
    with pytest.raises(
        M3Error, match=r"^modalities.text: its groups are of positions \(2\), but its tokenizer makes 4 "
    ):
        model.tokenise(M3Processor(model.config.modalities)(text=[torch.arange(4).numpy()]))


@pytest.mark.parametrize(
    ("wrong", "sentence"),
    [
        (lambda group: group.int(), "groups must be int64 .* with numbers from 0 to 11, got torch.int32"),
        (lambda group: group + 1, "number them anew in each sample"),
        (lambda group: group[:, 1:], "groups must be int64"),
        (lambda group: (group + len(group)) % group.shape[1], "alone has other groups than in a batch"),
    ],
)
def test_the_kit_finds_wrong_groups(wrong, sentence: str, monkeypatch: pytest.MonkeyPatch) -> None:
    right = Text.groups
    monkeypatch.setattr(Text, "groups", lambda part, signal: wrong(right(part, signal)))
    settings = {"type": "text", "vocabulary": ["a", "red", "cube"], "length": 12}
    samples = ["a red cube " * 4, "red cube a " * 4, "cube a " * 6]
    with pytest.raises(AssertionError, match=sentence):
        check_modality(settings, samples, {"type": "embedding"})


def test_the_description_alone_gives_the_edges(tmp_path: Path) -> None:
    path = written(tmp_path, "bpe")
    edges = open_vocabulary(describe(path)).word_edges()
    assert len(edges.begins) == len(edges.ends) == open_vocabulary(describe(path)).size
    assert 0 < sum(edges.begins) < len(edges.begins) / 2
