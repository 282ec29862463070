"""Text: every kind of vocabulary, models that need no file, sentences of any length, pictures and measures."""

import argparse
import io
import json
from pathlib import Path

import numpy as np
import pytest
import torch

from m3.config import M3Config
from m3.data.commands import vocabulary_command
from m3.data.files import Member
from m3.data.words import describe, open_vocabulary, train_vocabulary
from m3.errors import M3Error
from m3.modalities.text import Text
from m3.model import M3Model
from m3.network import build_modalities, resolved
from m3.plugins import Crop
from m3.processor import M3Processor
from m3.types import Batch

CORPUS = [
    "a red cube is left of a small green sphere",
    "the large blue cone stands behind two yellow cylinders",
    "an empty ground with nothing on it",
    "a cube, a sphere and a cone: three objects",
] * 10


def text(vocabulary: str | list[str], **settings) -> Text:
    return build_modalities({"x": {"type": "text", "vocabulary": vocabulary, **settings}})["x"]  # type: ignore[return-value]


def sentencepiece_model() -> bytes:
    trainer = pytest.importorskip("sentencepiece", reason="needs sentencepiece").SentencePieceTrainer
    written = io.BytesIO()
    trainer.train(
        sentence_iterator=iter(CORPUS), model_writer=written, vocab_size=60, hard_vocab_limit=False, minloglevel=2
    )
    return written.getvalue()


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Kind -> what a recipe says."""
    folder = tmp_path_factory.mktemp("vocabularies")
    for kind in ("wordpiece", "bpe"):
        (folder / f"{kind}.json").write_text(train_vocabulary(CORPUS, 400, kind), encoding="utf-8")
    (folder / "sp.model").write_bytes(sentencepiece_model())
    names = {"wordpiece": "wordpiece.json", "bpe": "bpe.json", "sentencepiece": "sp.model"}
    return {kind: str(folder / name) for kind, name in names.items()} | {"open_clip": "open_clip:"}


# -- vocabularies ---------------------------------------------------------------------------------------


def test_closed_words_by_hand() -> None:
    part = text(["a", "Red", "cube"])
    assert part.signal.classes == 4
    assert part.to_raw("a RED  cube of a\n").tolist() == [1, 2, 3, 0, 1]
    assert part.to_raw("a RED cube").dtype == torch.int32
    assert part.vocabulary.decode([3, 0, 2]) == "cube [UNK] red"
    assert part.normalise(torch.tensor([[1, 2], [3, -1]], dtype=torch.int32)).tolist() == [[1, 2], [3, -1]]


@pytest.mark.parametrize("kind", ["wordpiece", "bpe", "sentencepiece", "open_clip"])
def test_a_known_sentence_comes_back_and_every_id_is_in_the_vocabulary(kind: str, files: dict[str, str]) -> None:
    if kind == "open_clip":
        pytest.importorskip("open_clip", reason="needs open_clip")
    part = text(files[kind])
    for sentence in CORPUS[:3]:
        ids = part.to_raw(sentence)
        assert 3 <= len(ids) <= len(sentence)
        assert 0 <= int(ids.min()) <= int(ids.max()) < part.signal.classes
        assert part.vocabulary.decode(ids.tolist()) == sentence
        assert torch.equal(part.to_raw(ids.numpy()), ids)
    strange = part.vocabulary.encode("zebra 猫 ü")
    assert all(0 <= i < part.vocabulary.size for i in strange)
    again = part.vocabulary.decode(strange)
    if kind in ("bpe", "open_clip"):
        assert again.replace(" ", "") == "zebra猫ü", "byte-level vocabularies know every text"
    else:
        assert "猫" not in again


def test_wordpiece_marks_unknown_words_and_ignores_capitals(files: dict[str, str]) -> None:
    vocabulary = text(files["wordpiece"]).vocabulary
    assert vocabulary.encode("Red CUBE") == vocabulary.encode("red cube")
    assert vocabulary.encode("猫")[:1] == [0]
    assert vocabulary.decode([0]) == "[UNK]"


def test_clip_s_vocabulary_is_clips() -> None:
    """49,408 entries; "a" with an end of word is 320, "photo" 1125, as in OpenAI's tables."""
    pytest.importorskip("open_clip", reason="needs open_clip")
    vocabulary = text("open_clip:").vocabulary
    assert vocabulary.size == 49408
    assert vocabulary.encode("a photo") == [320, 1125]


def test_padding_and_cutting_that_a_file_asks_for_are_left_to_us(files: dict[str, str], tmp_path: Path) -> None:
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(files["wordpiece"])
    tokenizer.enable_padding(length=32)
    tokenizer.enable_truncation(2)
    tokenizer.save(str(tmp_path / "t.json"))
    assert (
        text(str(tmp_path / "t.json")).to_raw(CORPUS[0]).tolist() == text(files["wordpiece"]).to_raw(CORPUS[0]).tolist()
    )


def test_a_vocabulary_with_left_out_numbers_has_room_for_the_highest(tmp_path: Path) -> None:
    content = {"type": "WordLevel", "vocab": {"[UNK]": 0, "red": 1, "cube": 70}, "unk_token": "[UNK]"}
    whole = {"version": "1.0", "added_tokens": [], "model": content, "pre_tokenizer": {"type": "Whitespace"}}
    for key in ("truncation", "padding", "normalizer", "post_processor", "decoder"):
        whole[key] = None
    (tmp_path / "t.json").write_text(json.dumps(whole))
    part = text(str(tmp_path / "t.json"))
    assert part.signal.classes == 71
    assert part.to_raw("cube red blue").tolist() == [70, 1, 0]


def test_m3_data_vocabulary_writes_a_file_that_a_recipe_takes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "a.txt").write_text("\n".join(CORPUS), encoding="utf-8")
    for kind in ("wordpiece", "bpe"):
        out = tmp_path / "new" / f"{kind}.json"
        given = argparse.Namespace(files=[str(tmp_path / "a.txt")], out=str(out), size=300, kind=kind)
        vocabulary_command(given)
        part = text(str(out))
        assert (
            capsys.readouterr().out
            == f"{out}: {part.signal.classes} tokens from 40 lines. In a recipe: vocabulary: {out}\n"
        )
        assert 40 < part.signal.classes <= 300
        assert part.vocabulary.decode(part.to_raw(CORPUS[0]).tolist()) == CORPUS[0]


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (None, r"a.txt is no text in UTF-8 \(.*No such file.*\); give text files with one sentence a line.$"),
        (b"\xff\xfe\x00", r"a.txt is no text in UTF-8 \(.*invalid start byte.*\); give text files"),
        (b"\n \n", "^the corpus holds no words; give text files with one sentence a line.$"),
    ],
)
def test_a_corpus_without_text_is_refused(content: bytes | None, sentence: str, tmp_path: Path) -> None:
    if content is not None:
        (tmp_path / "a.txt").write_bytes(content)
    with pytest.raises(M3Error, match=sentence):
        vocabulary_command(
            argparse.Namespace(files=[str(tmp_path / "a.txt")], out=str(tmp_path / "v.json"), size=99, kind="bpe")
        )


@pytest.mark.parametrize(
    ("name", "content", "sentence"),
    [
        ("v.json", None, "^there is no vocabulary .*v.json; make one with `m3 data vocabulary`, or list the words.$"),
        ("v.txt", b"a b", "v.txt is no vocabulary that is known; give a tokenizer.json or a sentencepiece .model.$"),
        ("v.json", b"{]", "^text.vocabulary is no tokenizer.json that can be read: .+$"),
        ("v.json", b"\xff\xff", "^.*v.json is no vocabulary that is known; give a tokenizer.json or a sentencepiece"),
        ("v.model", b"nonsense", "^text.vocabulary is no sentencepiece model that can be read: .+$"),
        ("v.model", b"", "^text.vocabulary is no sentencepiece model that can be read: .+$"),
    ],
)
def test_a_wrong_vocabulary_is_one_sentence(name: str, content: bytes | None, sentence: str, tmp_path: Path) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(M3Error, match=sentence) as caught:
        text(str(tmp_path / name))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("vocabulary", "sentence"),
    [
        ([], "^text.vocabulary: the words must be at least one, and all different.$"),
        (["a", "A"], "^text.vocabulary: the words must be at least one, and all different.$"),
        (["fire truck"], "^text.vocabulary: `fire truck` is not one word; a list holds whole words without blanks.$"),
        ("open_clip:RN50", "^text.vocabulary: open_clip:RN50 is not known; write `open_clip:` for CLIP's own.$"),
        ("sentencepiece:@@@", "^text.vocabulary is no sentencepiece model that can be read: .+$"),
    ],
)
def test_a_wrong_list_is_one_sentence(vocabulary: str | list[str], sentence: str) -> None:
    with pytest.raises(M3Error, match=sentence):
        text(vocabulary)


# -- models need no file --------------------------------------------------------------------------------


def config(vocabulary: str | list[str], length: int = 12) -> M3Config:
    settings = {"type": "text", "vocabulary": vocabulary, "length": length, "tokenizer": {"type": "embedding"}}
    return M3Config(
        modalities={"text": resolved(settings, "modalities.text")},
        backbone={"width": 32, "depth": 2, "heads": 2},
        objectives={
            "reconstruct": {
                "type": "reconstruct",
                "masking": {"type": "fixed", "visible": 0.5},
                "decoder": {"type": "self_decoder", "width": 32, "depth": 1, "heads": 2},
                "targets": {"text": {"loss": "cross_entropy"}},
            }
        },
        seed=0,
    )


@pytest.mark.parametrize("kind", ["words", "wordpiece", "bpe", "sentencepiece", "open_clip"])
def test_a_model_folder_holds_its_vocabulary(kind: str, files: dict[str, str], tmp_path: Path) -> None:
    vocabulary: str | list[str] = ["a", "red", "cube"]
    if kind == "open_clip":
        pytest.importorskip("open_clip", reason="needs open_clip")
        vocabulary = files[kind]
    elif kind != "words":
        copy = tmp_path / Path(files[kind]).name
        copy.write_bytes(Path(files[kind]).read_bytes())
        vocabulary = str(copy)
    model = M3Model(config(vocabulary)).eval()
    expected = M3Processor(model.config.modalities)(text="a red cube")
    model.save_pretrained(tmp_path / "model")
    M3Processor(model.config.modalities).save_pretrained(tmp_path / "model")
    if kind not in ("words", "open_clip"):
        Path(str(vocabulary)).unlink()
    again, processor = M3Model.from_pretrained(tmp_path / "model"), M3Processor.from_pretrained(tmp_path / "model")
    batch = processor(text="a red cube")
    assert torch.equal(batch.signals["text"], expected.signals["text"])
    assert torch.equal(again.encode(batch).sequence, model.encode(expected).sequence)
    assert str(tmp_path) not in (tmp_path / "model" / "config.json").read_text()
    kept = again.config.modalities["text"]["vocabulary"]
    assert describe(kept) == kept
    assert open_vocabulary(kept).encode("a red cube") == batch.signals["text"][0].tolist()


# -- sentences of any length ----------------------------------------------------------------------------

WORDS = ["a", "b", "c", "d", "e", "f", "g", "h", "i", "j", "k", "l", "m", "n", "o", "p"]


def model_of_words() -> tuple[M3Model, M3Processor]:
    torch.manual_seed(0)
    model = M3Model(config(WORDS, length=16)).eval()
    return model, M3Processor(model.config.modalities)


def test_a_sentence_is_the_same_alone_and_beside_longer_ones() -> None:
    model, processor = model_of_words()
    short, long = "c a b", "h g f e d c b a o p n m"
    alone, both = processor(text=short), processor(text=[long, short])
    assert both.signals["text"].tolist() == [[8, 7, 6, 5, 4, 3, 2, 1, 15, 16, 14, 13], [3, 1, 2] + [-1] * 9]
    one, two = model.encode(alone), model.encode(both)
    assert two.is_valid is not None
    assert two.is_valid.sum(1).tolist() == [13, 4]
    torch.testing.assert_close(two.sequence[1, :4], one.sequence[0], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(two.pooled[1], one.pooled[0], atol=1e-5, rtol=1e-5)


def test_padding_is_never_seen_and_never_a_target() -> None:
    """Whatever stands behind the end (here: nothing or a word) leaves states, loss and counts as they are."""
    model, processor = model_of_words()
    batch = processor(text=["a b c d e f g h", "a b", "c", "d e f"])
    plans = [model.prepare(batch, seed) for seed in range(20)]
    for prepared in plans:
        (plan,) = prepared.plans.values()
        is_valid = prepared.tokens["text"].is_valid
        assert is_valid is not None
        index, is_there = plan.packed_index(), plan.is_valid
        assert is_there is not None
        assert is_valid.gather(1, index)[is_there].all()
        assert is_valid.gather(1, plan.target["text"])[plan.is_target["text"]].all()
        seen, asked = is_there.sum(1), plan.is_target["text"].sum(1)
        assert (seen + asked).tolist() == [8, 2, 1, 3]
        assert seen.tolist() == [4, 1, 1, 1]
        assert model.counts(prepared)["reconstruct/text"] == 4 + 1 + 0 + 2
    before = model(plans[0])
    tokens = plans[0].tokens["text"]
    tokens.values[~tokens.is_valid] = 5  # type: ignore[index]
    after = model(plans[0])
    assert torch.equal(after.loss, before.loss)


def test_the_loss_of_a_batch_is_the_sum_over_its_sentences() -> None:
    """One by one or together, padded: the same sums and counts, and finite gradients."""
    model, processor = model_of_words()
    sentences = ["a b c d e f g h i j", "a b", "c d e", "p o n m l"]
    together = model(processor(text=sentences)).parts.parts["reconstruct/text"]
    total, count = 0.0, 0.0
    for row, sentence in enumerate(sentences):
        single = processor(text=sentence)
        single = Batch(single.signals, torch.tensor([row]))
        part = model(single).parts.parts["reconstruct/text"]
        total, count = total + part.sum.item(), count + part.count.item()
    assert together.count.item() == count
    assert together.sum.item() == pytest.approx(total, rel=1e-4)
    (together.sum / together.count).backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())


def test_long_sentences_are_cut_and_absent_ones_are_no_tokens() -> None:
    model, processor = model_of_words()
    batch = processor(text=[" ".join(WORDS * 3), None, "a"])
    assert batch.signals["text"].shape == (3, 16)
    tokens = model.tokenise(batch)["text"]
    assert tokens.is_valid is not None
    assert tokens.is_valid.sum(1).tolist() == [16, 0, 1]
    assert model.encode(batch).sequence.isfinite().all()


# -- files, checks, pictures, measures ------------------------------------------------------------------


def test_text_files_are_utf8(tmp_path: Path) -> None:
    part = text(["grün", "b"])
    (tmp_path / "a.txt").write_bytes("  GRÜN b\n".encode())
    for file in (tmp_path / "a.txt", Member("grün b".encode(), "a.txt")):
        assert part.to_raw(part.load(file)).tolist() == [1, 2]
    (tmp_path / "a.txt").write_bytes("grün".encode("latin-1"))
    with pytest.raises(
        M3Error, match=r"a.txt can't be read as `text`: a text must be in UTF-8, but its byte 2 is not.$"
    ):
        M3Processor({"text": {"type": "text", "vocabulary": ["b"]}})(text=tmp_path / "a.txt")


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        ("", "^a text holds no words; leave the sample out.$"),
        (" \n", "^a text holds no words"),
        (np.array([1, 4]), "^a text holds id 4, but the vocabulary has 4 entries.$"),
        (np.array([-1, 2]), "^a text holds id -1, but the vocabulary has 4 entries.$"),
        (
            np.array([1.0, 2.0]),
            r"^a text must be a sentence or integer ids of shape \(length,\), got float64 of shape \(2,\)",
        ),
        (np.array([[1, 2]]), r"got int64 of shape \(1, 2\).$"),
        (7, r"got int64 of shape \(\).$"),
        (["a", "b"], r"got <U1 of shape \(2,\).$"),
    ],
)
def test_a_wrong_sample_is_refused(given: object, sentence: str) -> None:
    with pytest.raises(M3Error, match=sentence):
        text(["a", "red", "cube"]).to_raw(given)


def test_words_are_drawn_hidden_ones_as_dots(files: dict[str, str]) -> None:
    part = text(["a", "red", "cube"], length=5)
    ids = torch.tensor([1, 2, 3, -1, -1])
    whole = part.show(ids)
    assert (whole.dtype, whole.ndim, whole.shape[2]) == (np.uint8, 3, 3)
    assert whole.min() < 50, "something is written"
    is_known = torch.tensor([True, False, True, True, True])
    assert not np.array_equal(part.show(ids, is_known), whole)
    other = part.show(torch.tensor([1, 1, 3, -1, -1]), is_known)
    assert np.array_equal(other, part.show(ids, is_known)), "a hidden word does not show"
    bytes_of = text(files["bpe"])
    assert bytes_of.show(bytes_of.to_raw("猫 ü 😀").long()).shape == whole.shape


def test_accuracy_by_hand() -> None:
    part = text(["a", "red", "cube"], length=5)
    truth = torch.tensor([[1, 2, 3, 1, -1]])
    predicted = torch.tensor([[1, 3, 3, 2, -1]])
    sums = part.score(predicted, truth, torch.tensor([[True, True, True, False, True]]))
    assert sums.tolist() == [2, 3]
    assert part.finish_score(sums) == pytest.approx(2 / 3)


def test_blanks_and_crops() -> None:
    part = text(["a", "red"], length=6)
    assert part.blank(2).shape == (2, 6)
    assert part.blank(2).dtype == part.to_raw("a").dtype
    assert part.fit(part.to_raw("a red"), Crop((0, 0, 0.1, 0.1), True)).tolist() == [1, 2]
