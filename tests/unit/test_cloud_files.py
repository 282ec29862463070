"""Files of point clouds: every format gives the same points, every damage one sentence."""

import io
import struct
import zipfile
from pathlib import Path

import numpy as np
import pytest

from m3.data.clouds import read_cloud
from m3.errors import M3Error
from m3.modalities.points import Points

XYZ = (np.arange(15, dtype=np.float64).reshape(5, 3) - 4) / 8
COLOURS = np.arange(15, dtype=np.uint8).reshape(5, 3) * 17
FULL = np.concatenate([XYZ, COLOURS / 255], 1)

VERTEX = """element vertex 5
property double x
property uchar red
property uchar green
property int label
property float y
property float z
property uchar blue
property float heat
"""
FACE = "element face 2\nproperty uchar material\nproperty list uchar int vertex_indices\n"


def ply(form: str, order: str = "<", before: str = "", after: str = FACE) -> bytes:
    """A file with a list element before or after the points, and properties in an odd order."""
    header = f"ply\nformat {form} 1.0\ncomment größe\nobj_info x\n{before}{VERTEX}{after}end_header\n".encode("latin-1")
    rows = [(x, *rg, 7, y, z, b, i) for i, ((x, y, z), (*rg, b)) in enumerate(zip(XYZ, COLOURS.tolist(), strict=True))]
    faces = [(9, 3, 0, 1, 2), (9, 4, 0, 1, 2, 3)]
    if form == "ascii":
        points = "".join(" ".join(map(str, row)) + "\n" for row in rows)
        lists = "".join(" ".join(map(str, face)) + "\n" for face in faces)
        return header + (f"{lists}\n{points}" if before else points + lists).encode()
    points = b"".join(struct.pack(f"{order}dBBiffBf", *row) for row in rows)
    lists = b"".join(struct.pack(f"{order}BB{len(face) - 2}i", *face) for face in faces)
    return header + (lists + points if before else points + lists)


def pcd(data: str, body: bytes, fields: str = "x y z rgb", kinds: str = "F F F F", sizes: str = "4 4 4 4") -> bytes:
    count = f"COUNT {' '.join('1' for _ in fields.split())}\n" if data == "ascii" else ""
    header = f"# .PCD v0.7\nVERSION 0.7\nFIELDS {fields}\nSIZE {sizes}\nTYPE {kinds}\n{count}"
    return f"{header}WIDTH 5\nHEIGHT 1\nVIEWPOINT 0 0 0 1 0 0 0\nPOINTS 5\nDATA {data}\n".encode() + body


def packed(colours: np.ndarray) -> np.ndarray:
    red, green, blue = colours.astype(np.uint32).T
    return red << 16 | green << 8 | blue


def npz(**arrays: np.ndarray) -> bytes:
    stream = io.BytesIO()
    np.savez(stream, **arrays)  # type: ignore[arg-type]
    return stream.getvalue()


def npy(array: np.ndarray) -> bytes:
    stream = io.BytesIO()
    np.save(stream, array)
    return stream.getvalue()


BINARY = np.rec.fromarrays([*XYZ.T.astype("<f4"), packed(COLOURS).view("<f4")]).tobytes()
WIDE = np.rec.fromarrays([np.arange(5, dtype="<u2"), *XYZ.T.astype("<f8"), packed(COLOURS)]).tobytes()
LINES = [f"{x} {y} {z} {c.item()!r}\n" for (x, y, z), c in zip(XYZ, packed(COLOURS).view("f4"), strict=True)]
HEAT = np.concatenate([FULL, np.arange(5.0)[:, None]], 1)

FILES = {
    "ascii.ply": (ply("ascii"), HEAT),
    "windows.ply": (ply("ascii").replace(b"\n", b"\r\n"), HEAT),
    "little.ply": (ply("binary_little_endian"), HEAT),
    "big.ply": (ply("binary_big_endian", ">"), HEAT),
    "faces_first.ply": (ply("ascii", before=FACE, after=""), HEAT),
    "faces_first_big.PLY": (ply("binary_big_endian", ">", before=FACE, after=""), HEAT),
    "a.pcd": (pcd("ascii", "".join(LINES).encode()), FULL),
    "b.pcd": (pcd("binary", BINARY), FULL),
    "c.pcd": (pcd("binary", WIDE, "ring x y z rgba", "U F F F U", "2 8 8 8 4"), FULL),
    "a.npy": (npy(FULL.astype(np.float32)), FULL),
    "columns.npy": (npy(np.asfortranarray(XYZ)), XYZ),
    "ints.npy": (npy(np.arange(15, dtype=">i2").reshape(5, 3)), np.arange(15.0).reshape(5, 3)),
    "one.npz": (npz(anything=XYZ), XYZ),
    "several.npz": (npz(label=np.arange(5), rgb=COLOURS, xyz=XYZ, faces=np.ones((2, 3)), heat=np.arange(5.0)), HEAT),
    "a.xyz": (b"# a comment\n" + "".join(f"{x} {y}\t{z} # here\n\n" for x, y, z in XYZ).encode(), XYZ),
    "a.txt": ("\ufeff".encode() + "".join(f"{x}, {y},{z}\n" for x, y, z in XYZ).encode(), XYZ),
}


@pytest.mark.parametrize("name", FILES)
def test_files_of_every_format_give_the_same_points(name: str, tmp_path: Path) -> None:
    data, expected = FILES[name]
    (tmp_path / name).write_bytes(data)
    np.testing.assert_allclose(read_cloud(tmp_path / name), expected, atol=1e-7)
    stream = io.BytesIO(data)
    stream.name = f"archive/{name}"
    assert np.array_equal(read_cloud(stream), read_cloud(tmp_path / name))


def test_a_modality_takes_the_attributes_it_asks_for(tmp_path: Path) -> None:
    (tmp_path / "a.ply").write_bytes(ply("ascii"))
    for count in (0, 3, 4):
        part = Points(Points.Spec(attributes=count))
        assert part.to_raw(part.load(tmp_path / "a.ply")).shape == (5, 3 + count)
    part = Points(Points.Spec(attributes=5))
    with pytest.raises(
        M3Error, match=r"^a point cloud must hold numbers of shape \(points, 8\), got .* \(5, 7\); chang"
    ):
        part.to_raw(part.load(tmp_path / "a.ply"))


def bomb() -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("xyz.npy", npy(np.zeros((100_000, 3))))
    return stream.getvalue()


TEXT, LITTLE, BIG = ply("ascii"), ply("binary_little_endian"), ply("binary_big_endian", ">", FACE, "")
HUGE = b"vertex 9999999999999999999"
DAMAGED = {
    "a.obj": (b"v 0 0 0", r"a point cloud is read from .ply, .pcd, .*; convert the file"),
    "b.ply": (b"", "its header has no line `end_header`; copy or save it again"),
    "c.ply": (b"plx\nend_header\n", "it does not begin with `ply`"),
    "d.ply": (TEXT.replace(b"format ascii 1.0\n", b""), "its header names no format"),
    "e.ply": (TEXT.replace(b"ascii 1.0", b"ebcdic 1.0"), "its header line `format ebcdic 1.0` is unknown"),
    "f.ply": (TEXT.replace(b"property float z", b"property quad z"), "its header line `property quad z` is unknown"),
    "g.ply": (TEXT.replace(b"element vertex", b"element corner"), "it has no element `vertex`; export"),
    "h.ply": (TEXT.replace(b"float z", b"float w"), "it has no x, y and z but x, red, .*; rename or add them"),
    "i.ply": (TEXT.replace(b"vertex 5", HUGE), "names 9999999999999999999 points and the data ends after 7; "),
    "j.ply": (LITTLE.replace(b"vertex 5", HUGE), "names 9999999999999999999 points and the data ends after 6; "),
    "k.ply": (LITTLE[:-40], "names 5 points and the data ends after 4; copy or save it again"),
    "l.ply": (BIG.replace(b"face 2", b"face 99999999999"), "it ends in the middle of its data|after 0"),
    "m.ply": (TEXT.replace(b"vertex 5", b"vertex 0"), "it holds no points; leave it out"),
    "n.ply": (TEXT.replace(b"vertex 5", b"vertex -5"), "its header line `element vertex -5` is unknown"),
    "o.ply": (TEXT.replace(b"property float heat", b"property list uchar int heat"), "its vertices hold lists"),
    "p.ply": (TEXT.replace(b" 7 ", b" seven "), "its lines are not all the same number of plain numbers"),
    "q.ply": (TEXT.replace(b"property float heat\n", b""), "its lines have 8 numbers where the header names 7"),
    "r.ply": (TEXT.replace(b"vertex 5", b"vertex " + b"9" * 5000), "can't be read as a point cloud: "),
    "a.pcd": (pcd("binary_compressed", BINARY), "`binary_compressed`; save it as `ascii` or `binary`"),
    "b.pcd": (pcd("binary", BINARY[:-1]), "names 5 points and the data ends after 4"),
    "c.pcd": (pcd("binary", BINARY).replace(b"POINTS 5", b"POINTS 99999999999999"), "and the data ends after 5"),
    "d.pcd": (pcd("ascii", b"").replace(b"SIZE", b"SISE"), "its header has no SIZE; save it again"),
    "e.pcd": (pcd("ascii", b"").replace(b"TYPE F", b"TYPE Q"), "SIZE, TYPE and COUNT of its header don't match"),
    "f.pcd": (pcd("ascii", b"").replace(b"POINTS 5", b"POINTS five"), "invalid literal"),
    "g.pcd": (pcd("martian", b""), "its data is `martian`; save it as"),
    "h.pcd": (pcd("binary", BINARY, sizes="4 4 4"), "SIZE, TYPE and COUNT of its header don't match"),
    "a.npy": (npy(np.array([{}])), "it holds an array of type object; save numbers only"),
    "b.npy": (npy(XYZ)[:-1], r"its header names an array of shape \(5, 3\), which its data does not fill"),
    "c.npy": (npy(XYZ).replace(b"(5, 3)", b"(9**9)"), "can't be read as a point cloud"),
    "d.npy": (b"no array", "can't be read as a point cloud: .*magic"),
    "a.npz": (npz(a=XYZ, b=XYZ), "it holds no `points` or `xyz` but a, b; rename the array"),
    "b.npz": (npz(xyz=XYZ)[:-30], "can't be read as a point cloud: File is not a zip file"),
    "c.npz": (bomb(), "it expands to more than 100 times its size; save it uncompressed"),
    "d.npz": (npz(xyz=np.array(["a"])), "it holds an array of type <U1"),
    "a.xyz": (b"# nothing\n\n", "it holds no points; leave it out"),
    "b.xyz": (b"1 2 3\n4 5\n", "its lines are not all the same number of plain numbers"),
    "c.xyz": (b"1,,2,3\n4,,5,6\n", "its lines are not all the same number of plain numbers"),
    "d.xyz": (b"x y z\n1 2 3\n", "its lines are not all the same number of plain numbers"),
    "e.xyz": (b"\xff\xfe1 2 3", "can't be read as a point cloud"),
}


@pytest.mark.parametrize("name", DAMAGED)
def test_a_damaged_file_is_refused_in_one_sentence(name: str, tmp_path: Path) -> None:
    data, sentence = DAMAGED[name]
    (tmp_path / name).write_bytes(data)
    with pytest.raises(M3Error, match=sentence) as caught:
        read_cloud(tmp_path / name)
    text = str(caught.value)
    assert text.startswith(name)
    assert text.endswith(".")
    assert "\n" not in text


@pytest.mark.parametrize("name", ["little.ply", "faces_first_big.PLY", "ascii.ply", "b.pcd", "a.pcd", "several.npz"])
def test_no_cut_or_changed_byte_gives_another_exception(name: str, tmp_path: Path) -> None:
    """Every prefix of the file, and 300 files with one byte changed, are read or refused."""
    data = FILES[name][0]
    random = np.random.default_rng(1)
    changed = [bytearray(data) for _ in range(300)]
    for copy in changed:
        copy[random.integers(len(copy))] = random.integers(256)
    for part in [*(data[:end] for end in range(0, len(data), 7)), *map(bytes, changed)]:
        stream = io.BytesIO(part)
        stream.name = name
        try:
            read = read_cloud(stream)
        except M3Error:
            continue
        assert read.dtype == np.float64
