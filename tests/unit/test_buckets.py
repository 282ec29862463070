"""Batches of similar length: every sample once an epoch, the same for any cut, and much less padding."""

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor

from m3.data.loader import Buckets, Order, Samples, buckets_of, shuffled, train_loader
from m3.data.pack import pack
from m3.data.source import Source, open_source
from m3.data.sources.mixture import Mixture
from m3.errors import M3Error
from m3.network import build_modalities
from m3.recipe import DataSpec, load_recipe
from m3.train import train

WORDS = ["a", "red", "cube", "sphere", "and", "cone"]
MODALITIES = {
    "text": {"type": "text", "vocabulary": WORDS, "length": 64},
    "image": {"type": "image", "size": [8, 8]},
}
LENGTHS = torch.tensor([(7 * i) % 23 + 1 for i in range(50)])


def flat(order: Order) -> list[int]:
    return [index for batch in order for _, index in batch]


def order(micro: int = 4, *, stop: int = 40, **given) -> Order:
    return Order(len(LENGTHS), 7, micro, stop=stop, buckets=Buckets(LENGTHS, 3), **given)


@pytest.mark.parametrize("batch", [1, 4, 7, 50, 64])
def test_every_epoch_has_every_sample_once_and_an_order_of_its_own(batch: int) -> None:
    indices = flat(order(batch, stop=200 // batch + 1))
    epochs = [indices[first : first + 50] for first in range(0, 200, 50)]
    assert all(sorted(epoch) == list(range(50)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 4


def test_an_epoch_by_hand() -> None:
    """Two windows of two batches of three; the last two samples wait for the next epoch's first."""
    lengths = torch.arange(14) % 5
    drawn = shuffled(14, 3, 0).tolist()
    indices = flat(Order(14, 3, 3, stop=4, buckets=Buckets(lengths, 2)))
    sets = []
    for window in (drawn[:6], drawn[6:12]):
        ranked = sorted(window, key=lambda i: (int(lengths[i]), window.index(i)))
        sets += [ranked[:3], ranked[3:]]
    batches = [indices[first : first + 3] for first in range(0, 12, 3)]
    assert sorted(batches) == sorted(sets)
    assert batches != sets, "the batches are shuffled"
    both = flat(Order(14, 3, 3, stop=9, buckets=Buckets(lengths, 2)))
    assert both[12:14] == drawn[12:]
    assert both[14] == shuffled(14, 3, 1)[0]
    following = shuffled(14, 3, 1).tolist()[1:7]
    ranked = sorted(following, key=lambda i: (int(lengths[i]), following.index(i)))
    assert {tuple(both[15 + n : 18 + n]) for n in range(0, 12, 3)} >= {tuple(ranked[:3]), tuple(ranked[3:])}


@pytest.mark.parametrize(("micro", "accumulation", "world"), [(2, 4, 1), (4, 2, 1), (4, 1, 2), (2, 2, 2), (1, 2, 4)])
def test_every_cut_has_the_same_batches(micro: int, accumulation: int, world: int) -> None:
    whole = list(order(8, stop=20))
    cuts = [list(order(micro, stop=20, accumulation=accumulation, rank=rank, world=world)) for rank in range(world)]
    for step in range(20):
        turns = range(step * accumulation, (step + 1) * accumulation)
        pairs = [pair for turn in turns for rank in range(world) for pair in cuts[rank][turn]]
        assert pairs == whole[step]


@pytest.mark.parametrize("start", [1, 12, 13, 29])
def test_a_later_start_continues_in_the_middle(start: int) -> None:
    assert list(order(start=start)) == list(order())[start:]


def test_repeated_crops_stay_together() -> None:
    indices = flat(order(8, repeats=2, stop=25))
    assert indices[::2] == indices[1::2] == flat(order(4, stop=25))
    # Where a batch can't hold whole samples, each is still used `repeats` times an epoch.
    assert sorted(flat(order(4, repeats=3, stop=38))[:150]) == sorted([*range(50)] * 3)


# -- lengths of sources ---------------------------------------------------------------------------------


def sentences(count: int = 120) -> list[str]:
    return [" ".join(WORDS[(i + n) % 6] for n in range((i * 37) % 40 + 1)) for i in range(count)]


def source(root: Path | None, by: str = "text", kind: str = "folder", names=("text",), **given) -> Source:
    settings = {"source": kind, "root": root and str(root), "held_out": 0, "workers": 0}
    spec = DataSpec(**{**settings, "bucket": {"by": by, "batches": 8}, **given})
    return open_source(spec, build_modalities({name: MODALITIES[name] for name in names}), 0, "train")


def files(root: Path) -> Path:
    (root / "text").mkdir(parents=True)
    for i, sentence in enumerate(sentences()):
        (root / "text" / f"{i:03d}.txt").write_text(sentence, encoding="utf-8")
    return root


def manifest(root: Path) -> Path:
    rows = [json.dumps({"id": f"{i:03d}", "text": sentence}) for i, sentence in enumerate(sentences())]
    (root / "m.jsonl").write_text("\n".join(rows), encoding="utf-8")
    return root / "m.jsonl"


def test_a_folder_and_a_manifest_know_lengths_without_reading(tmp_path: Path) -> None:
    expected = [len(sentence) for sentence in sentences()]
    for root in (files(tmp_path / "f"), manifest(tmp_path)):
        found = buckets_of(source(root))
        assert found is not None
        assert found.lengths.tolist() == expected
        assert found.batches == 8
    assert buckets_of(source(files(tmp_path / "g"), bucket=None)) is None


def test_what_is_lacking_or_gone_has_length_zero(tmp_path: Path) -> None:
    (tmp_path / "m.csv").write_text("id,text,image\na,ein Würfel,\nb,,b.png\nc,a,gone.png\n", encoding="utf-8")
    (tmp_path / "b.png").write_bytes(bytes(99))
    both = source(tmp_path / "m.csv", names=("text", "image"))
    assert both.lengths("text") == [11, 0, 1]
    assert both.lengths("image") == [0, 99, 0]


def test_shards_and_mixtures_know_lengths_too(tmp_path: Path) -> None:
    folder = source(files(tmp_path / "f"))
    pack(folder, folder.modalities, tmp_path / "tars", per_shard=50)
    expected = [len(sentence) for sentence in sentences()]
    assert source(tmp_path / "tars", kind="shards").lengths("text") == expected
    (tmp_path / "m.csv").write_text("id,image\n" + "".join(f"{i},{i}.png\n" for i in range(30)), encoding="utf-8")
    parts = {
        "words": {"source": "folder", "root": str(tmp_path / "f"), "held_out": 0, "modalities": ["text"]},
        "pictures": {"source": "folder", "root": str(tmp_path / "m.csv"), "held_out": 0, "modalities": ["image"]},
    }
    mixed = source(None, kind="mixture", names=("text", "image"), options={"sources": parts}, missing="allow")
    assert isinstance(mixed, Mixture)
    places = [mixed.place(i) for i in range(len(mixed))]
    assert {part for part, _ in places} == {"words", "pictures"}
    assert mixed.lengths("text") == [expected[number] if part == "words" else 0 for part, number in places]


def test_what_cannot_be_sorted_is_refused(tmp_path: Path) -> None:
    root = files(tmp_path / "f")
    (root / "image").mkdir()
    (root / "image" / "000.png").write_bytes(b"x")
    with pytest.raises(M3Error, match=r"^data.bucket.by names `txt`, which is no modality. Did you mean `text`\?"):
        buckets_of(source(root, by="txt"))
    with pytest.raises(M3Error, match=r"^data.bucket.by: all samples of `image` have one length; name one that diff"):
        buckets_of(source(root, by="image", names=("text", "image"), missing="allow"))
    with pytest.raises(
        M3Error, match=r"^data.bucket: the source `world` knows the length of `text` only by reading ev"
    ):
        buckets_of(source(None, kind="world"))
    parts = {"a": {"source": "world"}, "b": {"source": "folder", "root": str(root)}}
    mixed = source(None, kind="mixture", options={"sources": parts}, samples=10)
    with pytest.raises(M3Error, match=r"^data.bucket: the source `mixture` knows the length of `text` only by reading"):
        buckets_of(mixed)


# -- what it is good for --------------------------------------------------------------------------------


def padding_share(given: Source, buckets: Buckets | None, micro: int, accumulation: int = 1) -> float:
    """Share of the tokens of an epoch that only fill sentences up."""
    samples = Samples(given, given.modalities, given.spec, 0)
    steps = len(given) // (micro * accumulation)
    turns = Order(len(given), 0, micro, accumulation, stop=steps, buckets=buckets)
    ids: list[Tensor] = [batch.signals["text"] for batch in train_loader(samples, turns, 0)]
    return sum(int((x < 0).sum()) for x in ids) / sum(x.numel() for x in ids)


def test_padding_falls_from_half_to_less_than_a_tenth(tmp_path: Path) -> None:
    given = source(files(tmp_path / "f"))
    buckets = buckets_of(given)
    assert padding_share(given, None, 8) > 0.4
    assert padding_share(given, buckets, 8) < 0.1
    assert padding_share(given, buckets, 2, 4) < 0.05, "within a batch, neighbours are of similar length too"


def test_a_run_can_only_be_continued_with_its_own_buckets(tmp_path: Path) -> None:
    recipe = """
name: words
modalities:
  text: {type: text, vocabulary: [a, red, cube, sphere, and, cone], length: 64, tokenizer: {type: embedding}}
backbone: {width: 16, depth: 1, heads: 2}
objectives:
  reconstruct:
    type: reconstruct
    masking: {type: fixed, visible: 0.5, scorer: {type: span}}
    decoder: {type: self_decoder, width: 16, depth: 1, heads: 2}
    targets: {text: {loss: cross_entropy}}
data: {source: folder, held_out: 4, workers: 0, bucket: {by: text, batches: 4}}
train: {steps: 1, batch_size: 8, micro_batch: 4, trackers: [], precision: fp32}
evaluate: {samples: 4, preview_rows: 1}
"""
    (tmp_path / "r.yaml").write_text(recipe, encoding="utf-8")
    given = [f"data.root={files(tmp_path / 'f')}", f"out={tmp_path / 'run'}"]
    train(load_recipe(tmp_path / "r.yaml", given), is_shown=False)
    with pytest.raises(M3Error, match=r"was trained on other data: `data.bucket.batches`"):
        train(load_recipe(tmp_path / "r.yaml", [*given, "data.bucket.batches=5"]), True, False)
