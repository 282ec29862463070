"""What documents show of the code is what the code is, and their links lead somewhere."""

import re
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[2]
DOCUMENTS = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")])
CONTRIBUTING = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")


def test_the_worked_example_shows_the_scorer_as_it_is() -> None:
    (shown,) = re.findall(r"```diff\n(.+?)```", CONTRIBUTING, re.DOTALL)
    lines = shown.splitlines()
    assert all(line.startswith("+") or not line for line in lines)
    code = "\n".join(line.removeprefix("+") for line in lines)
    assert code in (ROOT / "m3" / "scorers.py").read_text(encoding="utf-8")


def test_the_worked_example_shows_the_recipe_as_it_is() -> None:
    (shown,) = re.findall(r"```yaml\n(base: mae_vit_b.+?)```", CONTRIBUTING, re.DOTALL)
    recipe = (ROOT / "recipes" / "simmim_vit_b.yaml").read_text(encoding="utf-8")
    assert yaml.safe_load(shown) == yaml.safe_load(recipe)


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_links_to_files_lead_to_them(path: Path) -> None:
    links = re.findall(r"\]\(([^)#\s]+)", path.read_text(encoding="utf-8"))
    missing = [link for link in links if "://" not in link and not (path.parent / link).exists()]
    assert not missing, f"{path.name}: no such file: {missing}"
