"""`report.html` and `report.json`: what was measured, how and on what, in one file that needs no other."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Mapping
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
  td.n { white-space: normal; }
  td::before { content: attr(data-name); color: #777; text-align: left; }
}
"""


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
        (folder / "report.html").write_text(self._page(), encoding="utf-8")
        return folder / "report.html"

    def _page(self) -> str:
        facts = "".join(f'<p class="facts"><b>{escape(k)}</b> {escape(v)}</p>' for k, v in self.facts.items() if v)
        pictures = "".join(_picture(title, picture) for title, picture in self.pictures.items())
        recipe = f"<h2>Recipe</h2><pre>{escape(self.recipe)}</pre>" if self.recipe else ""
        return (
            '<!doctype html><html lang="en"><head><meta charset="utf-8">'
            '<meta name="viewport" content="width=device-width, initial-scale=1">'
            f"<title>{escape(self.title)}</title><style>{STYLE}</style></head><body><h1>{escape(self.title)}</h1>"
            f"{facts}{self._table()}{pictures}{recipe}</body></html>\n"
        )

    def _table(self) -> str:
        if not self.rows:
            return "<p>Nothing was measured.</p>"
        head = ("task", "measure", "model", "baseline", "difference", "baseline is")
        cells = "".join(f"<th{' class=n' if name in NUMBERS else ''}>{name}</th>" for name in head)
        body = "".join(_row(row, head) for row in self.rows)
        used = dict.fromkeys(row.baseline_name for row in self.rows)
        notes = "".join(f'<p class="note">{escape(BASELINES.get(name, name))}</p>' for name in used)
        if any(row.interval or row.difference for row in self.rows):
            notes += '<p class="note">in brackets: 95 % interval over the samples (bootstrap)</p>'
        return (
            f'<h2>Held-out samples</h2><div class="wide"><table><thead><tr>{cells}</tr></thead>'
            f"<tbody>{body}</tbody></table></div>{notes}"
        )


NUMBERS = ("model", "baseline", "difference")


def _row(row: Row, head: tuple[str, ...]) -> str:
    arrow = "\u2191" if row.higher_is_better else "\u2193"
    state = "won" if row.is_won else "lost"
    unsure = " (may be chance)" if row.is_sure is False else ""
    cells = (
        escape(row.task),
        f"{escape(row.measure)} {arrow}",
        f"{row.model:.4g}{_interval(row.interval)}",
        f"{row.baseline:.4g}",
        f'<span class="{state}">{row.model - row.baseline:+.4g}</span>{_interval(row.difference)}{unsure}',
        escape(row.baseline_name.replace("_", " ")),
    )
    return (
        "<tr>"
        + "".join(
            f'<td data-name="{name}"{" class=n" if name in NUMBERS else ""}><span>{cell}</span></td>'
            for name, cell in zip(head, cells, strict=True)
        )
        + "</tr>"
    )


def _interval(values: tuple[float, float] | None) -> str:
    return f" <small>[{values[0]:.3g}, {values[1]:.3g}]</small>" if values else ""


def _picture(title: str, picture: Figure | Path) -> str:
    if isinstance(picture, Path):
        if not picture.is_file():
            return ""
        data = picture.read_bytes()
    else:
        buffer = io.BytesIO()
        picture.savefig(buffer, format="png")
        data = buffer.getvalue()
    code = base64.b64encode(data).decode()
    return f'<h2>{escape(title)}</h2><img alt="{escape(title)}" src="data:image/png;base64,{code}">'
