"""Files in folders: photographs below a root, aligned modalities as root/<modality>/<id>.<ext>, or a manifest."""

from __future__ import annotations

from pathlib import Path

from m3.data.files import Stored
from m3.data.manifest import ENDINGS, Row, read_manifest
from m3.data.source import Sample, Source, Split, StoredSample, limited, numbers_of_split
from m3.errors import M3Error
from m3.plugins import Modality
from m3.recipe import DataSpec
from m3.samples import split_ending


class Folder(Source):
    """Every modality in the folder of its name; sample ids are the paths below it without ending.

    With one modality its files may also lie in the root itself, at any depth.
    `root/train` and `root/val` are used as the two splits when both exist; otherwise `held_out` samples (at most
    a tenth), chosen by a hash of their id, are held out. Where all ids begin with a folder, its number among those of
    the training samples, in alphabetical order, is the label `label` (root/train/<class>/...). The root may also be a
    manifest (.csv or .jsonl), whose columns are modalities, `id`, `label` or `label:NAME` and `split` (train, held_out
    or val); an empty value says that the sample lacks it.
    """

    def __init__(self, spec: DataSpec, modalities: dict[str, Modality], seed: int, split: Split) -> None:
        super().__init__(spec, modalities, seed, split)
        if spec.root is None:
            raise M3Error("data.root: this key is required for source `folder`; name the folder of your files.")
        self.root = Path(spec.root)
        if self.root.is_file():
            rows = self._manifest()
        elif self.root.is_dir():
            rows = self._folders()
        else:
            raise M3Error(f"data.root: the folder {self.root} does not exist; check the path.")
        if rows[0].split is None:
            numbers = numbers_of_split([row.id for row in rows], spec, split)
        else:
            numbers = limited([i for i, row in enumerate(rows) if row.split == split], spec, split)
        self.rows = [rows[i] for i in numbers]
        self.ids = [row.id for row in self.rows]

    def __len__(self) -> int:
        return len(self.rows)

    def read(self, index: int) -> Sample:
        """Load the files of one sample."""
        row = self.rows[index]
        signals = {}
        for name, value in row.values.items():
            try:
                signals[name] = value if isinstance(value, str) else self.modalities[name].load(value)
            except FileNotFoundError as error:
                raise self._no_file(row, name) from error
        return Sample(signals, row.id, row.labels)

    def stored(self, index: int) -> StoredSample:
        """Return the files of one sample byte for byte; text of the manifest as .txt."""
        row = self.rows[index]
        files = {}
        for name, value in row.values.items():
            try:
                is_text = isinstance(value, str)
                files[name] = (
                    Stored(".txt", value.encode()) if is_text else Stored(value.suffix.lower(), value.read_bytes())
                )
            except FileNotFoundError as error:
                raise self._no_file(row, name) from error
        return StoredSample(files, row.id, row.labels)

    def name(self, index: int) -> str:
        """Return the sample's path below the modality's folder, or its id in the manifest."""
        return self.ids[index]

    def coverage(self) -> dict[str, float]:
        """Count files and values; none is opened."""
        counts = {name: sum(name in row.values for row in self.rows) for name in self.modalities}
        return {name: count / max(1, len(self.rows)) for name, count in counts.items()}

    def known_labels(self, name: str) -> list[int | None]:
        """Look them up; no file is opened."""
        return [row.labels.get(name) for row in self.rows]

    def lengths(self, name: str) -> list[int]:
        """Ask for the sizes of files; none is opened. One that does not exist is reported when it is read."""
        return [_bytes(row.values.get(name, "")) for row in self.rows]

    def _manifest(self) -> list[Row]:
        if self.root.suffix not in ENDINGS:
            raise M3Error(f"data.root: {self.root} is neither a folder nor a manifest ({', '.join(ENDINGS)}).")
        return read_manifest(self.root, self.modalities)

    def _folders(self) -> list[Row]:
        """List the files of both splits where each has its folder, else of all samples."""
        if not ((self.root / "train").is_dir() and (self.root / "val").is_dir()):
            return _labelled(rows := self._rows(self.root, None), rows)
        train = self._rows(self.root / "train", self.split)
        return _labelled(train if self.split == "train" else self._rows(self.root / "val", self.split), train)

    def _rows(self, root: Path, split: str | None) -> list[Row]:
        files = {name: _files(root, name, part, len(self.modalities) == 1) for name, part in self.modalities.items()}
        if self.spec.missing == "error":
            _check_alignment(files, root)
        rows = []
        for key in sorted(set().union(*files.values())):
            values: dict[str, Path | str] = {name: found[key] for name, found in files.items() if key in found}
            rows.append(Row(key, values, {}, split, 0))
        return rows

    def _no_file(self, row: Row, name: str) -> M3Error:
        where = f"{self.root}, line {row.line}: " if row.line else ""
        return M3Error(f"{where}there is no file {row.values[name]} for `{name}`; correct the path or add the file.")


def _labelled(rows: list[Row], train: list[Row]) -> list[Row]:
    """Give rows the number of their class's folder among those of the training samples, if all of these have one."""
    folders = sorted({row.id.partition("/")[0] if "/" in row.id else "" for row in train})
    if "" in folders:
        return rows
    numbers = {folder: number for number, folder in enumerate(folders)}
    classes = [numbers.get(row.id.partition("/")[0]) for row in rows]
    return [row if k is None else row._replace(labels={"label": k}) for row, k in zip(rows, classes, strict=True)]


def _bytes(value: Path | str) -> int:
    if isinstance(value, str):
        return len(value.encode())
    return value.stat().st_size if value.exists() else 0


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
        inside = path.relative_to(folder).as_posix()
        split = split_ending(inside, modality.extensions)
        if split and path.is_file():
            key = split[0]
            if key in found and is_only:  # the ending only matters where files of modalities are to be paired
                key = inside
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
                f"every sample needs a file of the same name in each modality's folder, or set data.missing=allow."
            )
