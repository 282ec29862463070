"""Parts of all kinds from outside: entry points, names in full, and what is said when one does not load."""

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from m3.data.loader import Loaded, collate
from m3.errors import M3Error
from m3.network import build_modalities
from m3.parts import HOMES, available, find
from m3.plugins import Strict
from m3.recipe import load_recipe
from m3.samples import numbers, split_ending
from m3.targets import Values
from m3.testing import check_objective, check_scorer
from m3.train import build_model

PARTS = {
    "modalities": ("Grey", "from m3.modalities.image import Image as Base"),
    "tokenizers": ("Tiles", "from m3.tokenizers.patch import Patch as Base"),
    "scorers": ("Noise", "from m3.scorers import Uniform as Base"),
    "targets": ("Tripled", "from m3.targets import Values as Base"),
    "objectives": ("Rebuild", "from m3.objectives.reconstruct import Reconstruct as Base"),
    "positions": ("Waves", "from m3.positions import Sincos as Base"),
    "sources": ("Planet", "from m3.data.sources.world import World as Base"),
    "maskings": ("Steady", "from m3.maskings.fixed import Fixed as Base"),
    "coders": ("Passage", "from m3.coders import Vit as Base"),
    "quantisers": ("Rounding", "from m3.quantize import Fsq as Base"),
    "decoders": ("Slim", "from m3.heads import SelfDecoder as Base"),
    "tasks": ("Guess", "from m3.evaluate.tasks.predict import Predict as Base"),
}


@pytest.fixture
def outside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An installed package with one part of every kind, each a built-in one under another name."""
    lines = [text for name, base in PARTS.values() for text in (base, f"class {name}(Base):\n    pass\n")]
    (tmp_path / "outside_parts.py").write_text("\n".join(lines))
    described = tmp_path / "outside_parts-1.0.dist-info"
    described.mkdir()
    (described / "METADATA").write_text("Metadata-Version: 2.1\nName: outside-parts\nVersion: 1.0\n")
    groups = [f"[m3.{kind}]\n{name.lower()} = outside_parts:{name}\n" for kind, (name, _) in PARTS.items()]
    broken = [text + "broken = outside_parts:Gone\nlost = no_such_package:Part\n" for text in groups]
    (described / "entry_points.txt").write_text("\n".join(broken))
    monkeypatch.syspath_prepend(tmp_path)
    yield tmp_path
    sys.modules.pop("outside_parts", None)


def test_there_is_a_part_for_every_kind() -> None:
    assert set(PARTS) == set(HOMES)


@pytest.mark.parametrize("kind", PARTS)
def test_a_part_from_outside_is_found_by_entry_point_and_in_full(kind: str, outside: Path) -> None:
    name = PARTS[kind][0]
    assert name.lower() in available(kind)
    found = find(kind, name.lower())
    assert (found.__module__, found.__name__) == ("outside_parts", name)
    assert find(kind, f"outside_parts:{name}") is found


@pytest.mark.parametrize("kind", PARTS)
def test_a_plugin_that_fails_to_load_says_its_name_and_why(kind: str, outside: Path) -> None:
    with pytest.raises(M3Error, match=f"^the plugin `broken` in `{kind}` failed to load: AttributeError: .*'Gone'"):
        find(kind, "broken")
    why = rf"^the plugin `lost` in `{kind}` failed to load: ModuleNotFoundError: No module named 'no_such_package'\. "
    with pytest.raises(M3Error, match=why + "Install or repair the package `no_such_package`.$"):
        find(kind, "lost")
    with pytest.raises(M3Error, match=rf"^`brokn` in `{kind}` is not known: .* Did you mean `broken`\?$"):
        find(kind, "brokn")


@pytest.mark.parametrize("form", ["{}", "outside_parts:{}"])
def test_a_recipe_of_parts_from_outside_builds_and_learns(form: str, outside: Path) -> None:
    """Every kind at once, by entry point or in full."""

    def name(kind: str) -> str:
        own = PARTS[kind][0]
        return form.format(own.lower() if form == "{}" else own)

    modality = {"type": name("modalities"), "size": 16, "positions": {"type": name("positions")}}
    modality["tokenizer"] = {"type": name("tokenizers"), "size": 8}
    objective = {
        "type": name("objectives"),
        "masking": {"type": name("maskings"), "visible": 0.5, "scorer": {"type": name("scorers")}},
        "decoder": {"type": name("decoders"), "width": 48, "depth": 1, "heads": 2},
        "targets": {"photo": {"target": {"type": name("targets")}}},
    }
    draw = torch.Generator().manual_seed(0)
    samples = [torch.randint(0, 256, (3, 16, 16), dtype=torch.uint8, generator=draw) for _ in range(4)]
    check_objective(objective, {"photo": modality}, {"photo": samples})
    check_scorer({"type": name("scorers")})
    source = [f"data.source={name('sources')}"]
    assert build_model(load_recipe("mae_tiny", [*source, "backbone.depth=1"])).modalities


def test_a_target_needs_no_settings_of_the_built_in_one() -> None:
    """Only `width`, `is_relative`, a call and `restore` are asked of a target, not a setting `normalise`."""
    objective = {
        "type": "reconstruct",
        "decoder": {"type": "self_decoder", "width": 48, "depth": 1, "heads": 2},
        "targets": {"image": {"target": {"type": f"{__name__}:Halved"}}},
    }
    modality = {"type": "image", "size": 16, "tokenizer": {"type": "patch", "size": 4}}
    check_objective(objective, {"image": modality}, {"image": [torch.full((3, 16, 16), 9, dtype=torch.uint8)] * 2})


class Halved:
    """The values of a token, halved."""

    class Spec(Strict):
        pass

    def __init__(self, spec, tokenizer) -> None:
        self.inner = Values(Values.Spec(), tokenizer)
        self.width, self.is_relative = self.inner.width, False

    def __call__(self, tokens, index):
        return self.inner(tokens, index) / 2

    def restore(self, predicted, tokens):
        return predicted * 2


# -- what plugins read samples with -----------------------------------------------------------------------


def test_the_longest_ending_counts() -> None:
    endings = (".gz", ".nii", ".nii.gz")
    assert split_ending("a/B.NII.GZ", endings) == ("a/B", ".nii.gz")
    assert split_ending("b.nii", endings) == ("b", ".nii")
    assert split_ending("c.tar.gz", endings) == ("c.tar", ".gz")
    assert split_ending("d.png", endings) is None


@pytest.mark.parametrize(
    ("sample", "sentence"),
    [
        (None, "^a map must be one array of numbers, got object; convert it first.$"),
        ("text", "^a map must be one array of numbers, got <U4; convert it first.$"),
        ([[1, 2], [3]], "^a map must be one array of numbers .*inhomogeneous.*; convert it first.$"),
        (torch.zeros(0, 3), r"^a map of shape \(0, 3\) is empty; leave the sample out.$"),
        (torch.zeros(2, requires_grad=True), "^a map must be one array of numbers .*grad.*; convert it first.$"),
        (
            torch.zeros(2, dtype=torch.complex64),
            "^a map must be one array of numbers, got complex64; convert it first.$",
        ),
    ],
)
def test_what_is_no_array_of_numbers_is_refused(sample: object, sentence: str) -> None:
    with pytest.raises(M3Error, match=sentence):
        numbers(sample, "a map")


def test_a_batch_of_training_holds_modalities_that_all_its_samples_lack() -> None:
    """A network that leaves parts out by chance would wait for gradients that don't come on several processes."""
    parts = build_modalities({"image": {"type": "image", "size": 4}, "depth": {"type": "depth", "size": 4}})
    samples = [Loaded({"depth": torch.arange(16.0).reshape(4, 4) + i}, i, str(i)) for i in range(2)]
    assert list(collate(samples, parts).signals) == ["depth"]
    batch = collate(samples, parts, ("image", "depth"))
    assert list(batch.signals) == ["image", "depth"]
    assert batch.signals["image"].shape == (2, 3, 4, 4)
    assert {name: there.tolist() for name, there in batch.is_present.items()} == {"image": [False, False]}
    assert batch.signals["depth"][1].flatten().tolist() == list(range(1, 17))
