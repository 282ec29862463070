"""Files in folders: photographs anywhere below a root, or aligned modalities as root/<modality>/<id>.<ext>."""

from __future__ import annotations

import hashlib
from pathlib import Path

from m3.data.source import Sample, Source, Split
from m3.errors import M3Error
from m3.plugins import Modality
from m3.recipe import DataSpec
from m3.samples import split_ending


class Folder(Source):
    """Every modality in the folder of its name; sample ids are the paths below it without ending.

    With one modality its files may also lie in the root itself, at any depth. `root/train` and `root/val` are
    used as the two splits when both exist; otherwise `held_out` samples (at most a tenth), chosen by a hash of
    their id, are held out.
    """

    def __init__(self, spec: DataSpec, modalities: dict[str, Modality], seed: int, split: Split) -> None:
        super().__init__(spec, modalities, seed, split)
        if spec.root is None:
            raise M3Error("data.root: this key is required for source `folder`; name the folder of your files.")
        root = Path(spec.root)
        if not root.is_dir():
            raise M3Error(f"data.root: the folder {root} does not exist; check the path.")
        is_split = (root / "train").is_dir() and (root / "val").is_dir()
        if is_split:
            root = root / ("train" if split == "train" else "val")
        self.files = {name: _files(root, name, part, len(modalities) == 1) for name, part in modalities.items()}
        _check_alignment(self.files, root)
        ids = sorted(next(iter(self.files.values())))
        if not is_split:
            ids = _split(ids, spec.held_out, split)
        self.ids = ids[: spec.samples] if split == "train" else ids[: spec.held_out]

    def __len__(self) -> int:
        return len(self.ids)

    def read(self, index: int) -> Sample:
        """Load the files of one sample."""
        key = self.ids[index]
        return Sample({name: part.load(self.files[name][key]) for name, part in self.modalities.items()}, key)

    def name(self, index: int) -> str:
        """Return the sample's path below the modality's folder."""
        return self.ids[index]


def _files(root: Path, name: str, modality: Modality, is_only: bool) -> dict[str, Path]:
    """Return sample id -> file of one modality."""
    folder = root / name
    if not folder.is_dir():
        if not is_only:
            there = ", ".join(sorted(p.name for p in root.iterdir() if p.is_dir())) or "none"
            raise M3Error(
                f"{root} has no folder `{name}` for the modality of that name (folders there: {there}); "
                f"add it, or rename the modality in the recipe."
            )
        folder = root
    found: dict[str, Path] = {}
    for path in sorted(folder.rglob("*")):
        split = split_ending(path.relative_to(folder).as_posix(), modality.extensions)
        if split and path.is_file():
            key = split[0]
            if key in found:
                raise M3Error(f"{folder}: {found[key].name} and {path.name} have the same id `{key}`; remove one.")
            found[key] = path
    if not found:
        raise M3Error(
            f"{folder} holds no file that `{name}` can read ({', '.join(modality.extensions)}); check data.root."
        )
    return found


def _check_alignment(files: dict[str, dict[str, Path]], root: Path) -> None:
    """Raise when a sample lacks a modality: alignment is by id, never by order."""
    everything = set().union(*files.values())
    for name, found in files.items():
        lacking = sorted(everything - set(found))
        if lacking:
            other = next(n for n, f in files.items() if lacking[0] in f)
            raise M3Error(
                f"{root}: `{lacking[0]}` is in `{other}` but not in `{name}` ({len(lacking)} such in all); "
                f"every sample needs a file of the same name in each modality's folder."
            )


def _split(ids: list[str], held_out: int, split: Split) -> list[str]:
    """Hold out the ids with the smallest hashes, so that adding files moves none between the splits' ends."""
    by_hash = sorted(ids, key=lambda key: hashlib.blake2b(key.encode(), digest_size=8).digest())
    kept = set(by_hash[: min(held_out, len(ids) // 10)])
    return [key for key in ids if (key in kept) == (split == "held_out")]
