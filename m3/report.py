"""`report.html` and `report.json`: what was measured, how and on what, in one file that needs no other."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Container, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING

from m3.evaluate.task import Row
from m3.show import BASELINES

if TYPE_CHECKING:
    from matplotlib.figure import Figure

STYLE = """
:root { color-scheme: light dark; --line: #8884; --good: #15803d; --bad: #b91c1c; }
@media (prefers-color-scheme: dark) { :root { --good: #4ade80; --bad: #f87171; } }
body { font: 16px/1.5 system-ui, sans-serif; margin: 0 auto; padding: 1rem; max-width: 62rem; }
h1 { font-size: 1.5rem; margin: .5rem 0 0; } h2 { font-size: 1.15rem; margin: 2rem 0 .5rem; }
p.facts, p.note { color: #777; margin: .2rem 0; font-size: .9rem; overflow-wrap: anywhere; }
.wide { overflow-x: auto; } table { border-collapse: collapse; width: 100%; font-size: .92rem; }
th, td { text-align: left; padding: .35rem .6rem; border-bottom: 1px solid var(--line); vertical-align: top; }
th.n, td.n { text-align: right; white-space: nowrap; font-variant-numeric: tabular-nums; }
.won { color: var(--good); } .lost { color: var(--bad); } small { color: #777; }
img { max-width: 100%; height: auto; background: #fff; border-radius: .3rem; }
pre { overflow-x: auto; font-size: .82rem; border: 1px solid var(--line); border-radius: .3rem; padding: .6rem; }
@media (max-width: 40rem) {
  thead { display: none; } tr { display: block; padding: .4rem 0; border-bottom: 1px solid var(--line); }
  td, td.n { display: flex; justify-content: space-between; gap: 1rem; border: 0; padding: .1rem 0; text-align: right; }
  td.n { white-space: normal; } td br { display: none; }
  td::before { content: attr(data-name); color: #777; text-align: left; }
}
"""


def write_page(
    folder: Path,
    title: str,
    facts: Mapping[str, str],
    table: str,
    pictures: Mapping[str, Figure | Path],
    recipe: str = "",
) -> Path:
    """Write `report.html` into a folder and return it.

    Args:
        folder: that is there.
        title: of the page.
        facts: name -> value; empty ones are left out.
        table: HTML.
        pictures: title -> figure, or PNG file; a file that is not there is left out.
        recipe: as YAML; empty: none.
    """
    known = "".join(f'<p class="facts"><b>{escape(k)}</b> {escape(v)}</p>' for k, v in facts.items() if v)
    drawn = "".join(_picture(name, picture) for name, picture in pictures.items())
    settings = f"<h2>Recipe</h2><pre>{escape(recipe)}</pre>" if recipe else ""
    (folder / "report.html").write_text(
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title><style>{STYLE}</style></head><body><h1>{escape(title)}</h1>"
        f"{known}{table}{drawn}{settings}</body></html>\n",
        encoding="utf-8",
    )
    return folder / "report.html"


def table_of(head: Sequence[str], lines: Iterable[Sequence[str]], numbers: Container[str]) -> str:
    """Return a table, which on a phone becomes a list: columns, cells as HTML, and which columns are numbers."""
    cells = "".join(f"<th{_class(name in numbers)}>{escape(name)}</th>" for name in head)
    body = "".join(
        "<tr>"
        + "".join(
            f'<td data-name="{escape(name)}"{_class(name in numbers)}><span>{cell}</span></td>'
            for name, cell in zip(head, line, strict=True)
        )
        + "</tr>"
        for line in lines
    )
    return f'<div class="wide"><table><thead><tr>{cells}</tr></thead><tbody>{body}</tbody></table></div>'


def interval_text(values: tuple[float, float] | None) -> str:
    """Return an interval in brackets, as HTML; empty where there is none."""
    return f" <small>[{values[0]:.3g}, {values[1]:.3g}]</small>" if values else ""


def difference_text(value: float, is_better: bool, interval: tuple[float, float] | None) -> str:
    """Return a difference in the colour of its sign, with its interval and whether it may be chance, as HTML."""
    may_be = interval is not None and interval[0] <= 0 <= interval[1]
    unsure = " (may be chance)" if may_be else ""
    state = "won" if is_better else "lost"
    return f'<span class="{state}">{value:+.4g}</span>{interval_text(interval)}{unsure}'


def _class(is_number: bool) -> str:
    return " class=n" if is_number else ""


@dataclass
class Report:
    """What a report tells.

    Attributes:
        title: of the page.
        facts: name -> value: model, data, command and so on.
        rows: what was measured.
        pictures: title -> figure, or PNG file; a file that is not there is left out.
        recipe: as YAML; empty: none.
    """

    title: str
    facts: dict[str, str]
    rows: list[Row]
    pictures: Mapping[str, Figure | Path] = field(default_factory=dict)
    recipe: str = ""

    def write(self, folder: Path) -> Path:
        """Write `report.html` and `report.json` into a folder and return the former."""
        folder.mkdir(parents=True, exist_ok=True)
        content = {"title": self.title, "facts": self.facts, "rows": [row.facts() for row in self.rows]}
        (folder / "report.json").write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
        return write_page(folder, self.title, self.facts, self._table(), self.pictures, self.recipe)

    def _table(self) -> str:
        if not self.rows:
            return "<p>Nothing was measured.</p>"
        used = dict.fromkeys(row.baseline_name for row in self.rows)
        notes = "".join(f'<p class="note">{escape(BASELINES.get(name, name))}</p>' for name in used)
        for remark in dict.fromkeys(row.remark for row in self.rows if row.remark):
            notes += f'<p class="note">{escape(remark)}</p>'
        if any(row.interval or row.difference for row in self.rows):
            notes += '<p class="note">in brackets: 95 % interval over the samples (bootstrap)</p>'
        return f"<h2>Held-out samples</h2>{table_of(HEAD, map(_cells, self.rows), NUMBERS)}{notes}"


WIDEST, SHRUNK = 700, 0.5
"""Pixels from which a picture is scrolled sideways on a phone, rather than made smaller than this share."""
HEAD = ("task", "measure", "model", "baseline", "difference")
NUMBERS = ("model", "baseline", "difference")


def _cells(row: Row) -> tuple[str, ...]:
    arrow = "\u2191" if row.higher_is_better else "\u2193"
    return (
        escape(row.task),
        f"{escape(row.measure)} {arrow}",
        f"{row.model:.4g}{interval_text(row.interval)}",
        f"{row.baseline:.4g} <br><small>{escape(row.baseline_name.replace('_', ' '))}</small>",
        difference_text(row.model - row.baseline, row.is_won, row.difference),
    )


def _picture(title: str, picture: Figure | Path) -> str:
    if isinstance(picture, Path):
        if not picture.is_file():
            return ""
        data = picture.read_bytes()
    else:
        buffer = io.BytesIO()
        picture.savefig(buffer, format="png")
        data = buffer.getvalue()
    code, width = base64.b64encode(data).decode(), int.from_bytes(data[16:20])  # a PNG begins with its size
    style = f' style="min-width:{round(SHRUNK * width)}px"' if width > WIDEST else ""
    image = f'<img alt="{escape(title)}" src="data:image/png;base64,{code}"{style}>'
    return f'<h2>{escape(title)}</h2><div class="wide">{image}</div>'
