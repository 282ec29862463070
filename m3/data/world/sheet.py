"""A contact sheet: scenes with all their signals, to look at and to listen to.

Letters: H height, W width.
"""

from __future__ import annotations

import wave
from pathlib import Path
from typing import Any

import numpy as np

from m3.data.recording import Sound
from m3.data.world.derived import Box
from m3.data.world.render import FAR
from m3.data.world.scene import Split
from m3.data.world.source import WorldSource

SIDE = 128
"""Pixels of a picture."""

SHOWN = 4
"""Frames of the video that are shown, evenly chosen."""

ROW = 1.95
"""Height of a row, inches."""

LINES = {"sphere": "tomato", "cube": "limegreen", "cylinder": "deepskyblue", "cone": "gold"}


def contact_sheet(seed: int, split: Split, count: int, out: Path) -> None:
    """Draw the first `count` scenes of a split as one PNG, a row each, and write their sounds beside it.

    Args:
        seed: of the world.
        split: train or held_out.
        count: number of scenes, at least 1.
        out: the PNG file; the sound of scene 3 of `sheet.png` is `sheet_3.wav`.
    """
    from matplotlib.figure import Figure

    source = WorldSource(seed, split, count, SIDE, SIDE)
    figure = Figure(figsize=(19, ROW * count), dpi=100)
    rows = figure.add_gridspec(count, 1)
    out.parent.mkdir(parents=True, exist_ok=True)
    for index in range(count):
        sample = source.read(index)
        _draw(figure.add_subfigure(rows[index]), sample["signals"], sample["id"])
        write_wav(sample["signals"]["audio"], out.with_name(f"{out.stem}_{index}.wav"))
    figure.savefig(out)


def write_wav(sound: Sound, path: Path) -> None:
    """Write a recording as a stereo file of 16 bits."""
    with wave.open(str(path), "wb") as file:
        file.setnchannels(2)
        file.setsampwidth(2)
        file.setframerate(sound.rate)
        file.writeframes((sound.samples.T * 32767).round().astype("<i2").tobytes())


def _draw(row: Any, signals: dict[str, Any], name: str) -> None:
    """Draw one scene into a figure, its caption above it."""
    row.suptitle(f"{signals['text']}   ({name})", x=0.006, y=0.98, ha="left", fontsize=10)
    pictures = _pictures(signals)
    grid = row.add_gridspec(
        1, len(pictures) + 3, left=0.005, right=0.99, top=0.79, bottom=0.03, wspace=0.05,
        width_ratios=[1] * len(pictures) + [1.3, 0.15, 1.8],
    )  # fmt: skip
    for cell, (title, picture) in zip(grid, pictures.items(), strict=False):
        axis = row.add_subplot(cell)
        axis.imshow(picture, cmap="magma_r", interpolation="nearest", vmin=2, vmax=FAR)
        axis.set_title(title, fontsize=8, pad=3)
        axis.axis("off")
        if title == "boxes":
            _draw_boxes(axis, signals["boxes"])
    _draw_points(row.add_subplot(grid[len(pictures)], projection="3d"), signals["points"])
    _draw_sound(row.add_subplot(grid[-1]), signals["audio"])


def _pictures(signals: dict[str, Any]) -> dict[str, np.ndarray]:
    """Return title -> colours (H, W, 3) or metres (H, W)."""
    clip = signals["video"]
    chosen = np.linspace(0, len(clip.times) - 1, SHOWN).round().astype(int)
    return {
        "image": signals["image"],
        "depth": signals["depth"],
        "semantic map": np.array(WorldSource.PALETTE, np.uint8)[signals["semantic_map"]],
        "normals": np.clip((signals["normals"] + 1) / 2, 0, 1),
        "boxes": signals["image"],
        **{f"video, {clip.times[i]:.2f} s": clip.frames[i] for i in chosen},
    }


def _draw_boxes(axis: Any, boxes: list[Box]) -> None:
    for label, x0, y0, x1, y1 in boxes:
        # Pixel 0 reaches from -0.5 to 0.5.
        left, top, right, bottom = (SIDE * edge - 0.5 for edge in (x0, y0, x1, y1))
        axis.plot([left, right, right, left, left], [top, top, bottom, bottom, top], color=LINES[label], lw=1.3)
        plate = {"facecolor": LINES[label], "edgecolor": "none", "pad": 0.8}
        axis.text(left + 1.5, top + 1.5, label, fontsize=6, va="top", bbox=plate, clip_on=True)


def _draw_points(axis: Any, points: np.ndarray) -> None:
    """Draw points (P, 6) as an observer behind and above the camera sees them."""
    x, y, z = points[:, :3].T
    for metre in range(-3, 4):
        axis.plot([metre, metre], [-3, 3], [0, 0], color="0.85", lw=0.6, zorder=0)
        axis.plot([-3, 3], [metre, metre], [0, 0], color="0.85", lw=0.6, zorder=0)
    axis.scatter(x, y, z, c=points[:, 3:], s=3, depthshade=False, linewidths=0, zorder=1)
    axis.set(xlim=(-3, 3), ylim=(-3, 3), zlim=(0, 2))
    axis.set_box_aspect((6, 6, 2), zoom=1.5)
    axis.view_init(elev=32, azim=-90)
    axis.computed_zorder = False  # the ground is always behind
    axis.set_axis_off()
    axis.set_title("points", fontsize=8, pad=3)


def _draw_sound(axis: Any, sound: Sound) -> None:
    """Draw the left ear above the right one."""
    time = np.arange(sound.samples.shape[1]) / sound.rate
    height = 1.05 * np.abs(sound.samples).max()
    for samples, middle, colour in zip(sound.samples, (height, -height), ("tab:blue", "tab:orange"), strict=True):
        axis.plot(time, samples + middle, lw=0.4, color=colour)
    axis.set(xlim=(0, time[-1]), ylim=(-2 * height, 2 * height))
    axis.set_yticks([height, -height], ["left", "right"], fontsize=7)
    axis.tick_params(length=2, labelsize=7)
    axis.set_title(f"sound, 0 to {len(time) / sound.rate:g} s, up to {height / 1.05:.3f}", fontsize=8, pad=3)
    axis.set_xticks([])
    for side in ("top", "right", "bottom", "left"):
        axis.spines[side].set_visible(False)
