"""Who may import whom, read from the syntax trees; how long files, functions and parameter lists may be."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
LINKS = {"tokenizers", "modalities", "recipes"}
COMPOSING = {"model", "processor", "train", "check", "bench", "summary", "show", "reconstruct", "cli", "doctor"}
COMPOSING |= {"label_efficiency", "table", "inputs", "embed", "tokenizer_model", "own_teacher", "data.commands"}
COMPOSING |= {
    "held_out",
    "measure",
    "side_by_side",
    "initialise",
    "convert",
    "bench_data",
    "overhead",
    "build",
    "cost",
    "scale",
    "tokenize_data",
    "saving",
    "export",
    "testing.learning",
    "testing.modality",
    "auto",
    "__init__",
}


def python_files() -> dict[str, Path]:
    """Module name without the leading `m3.` -> file; the shelves once, under the name they are imported by."""
    engine = [path.relative_to(ROOT / "m3") for path in (ROOT / "m3").rglob("*.py")]
    found = {path: ROOT / "m3" / path for path in engine if path.parts[0] not in LINKS}
    found |= {Path(shelf, path.name): path for shelf in LINKS for path in (ROOT / shelf).glob("*.py")}
    return {".".join(path.with_suffix("").parts).removesuffix(".__init__"): found[path] for path in sorted(found)}


def is_for_types(node: ast.stmt) -> bool:
    return isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)


def at_load(nodes: list[ast.stmt], with_types: bool) -> Iterator[ast.Import | ast.ImportFrom]:
    """Imports that run when a file is loaded (not those inside functions); on demand also those for types."""
    for node in nodes:
        if isinstance(node, ast.Import | ast.ImportFrom):
            yield node
        elif isinstance(node, ast.If | ast.Try | ast.With | ast.ClassDef) and (with_types or not is_for_types(node)):
            inner = [*node.body, *getattr(node, "orelse", []), *getattr(node, "finalbody", [])]
            inner += [s for handler in getattr(node, "handlers", []) for s in handler.body]
            yield from at_load(inner, with_types)


def anywhere(tree: ast.Module) -> Iterator[ast.Import | ast.ImportFrom]:
    return (node for node in ast.walk(tree) if isinstance(node, ast.Import | ast.ImportFrom))


def names(nodes: Iterator[ast.Import | ast.ImportFrom]) -> set[str]:
    """Full dotted names; of `from a import b` both `a` and `a.b`, since either may be the module."""
    found: set[str] = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        else:
            assert node.level == 0, "imports are written in full"
            found |= {node.module or ""} | {f"{node.module}.{alias.name}" for alias in node.names}
    return found


FILES = python_files()
TREES = {name: ast.parse(path.read_text(encoding="utf-8")) for name, path in FILES.items()}
each_file = pytest.mark.parametrize("name", FILES)


def ours(nodes: Iterator[ast.Import | ast.ImportFrom]) -> set[str]:
    return {n.removeprefix("m3.") for n in names(nodes) if n.startswith("m3.") and n.removeprefix("m3.") in FILES}


def test_the_files_are_all_found() -> None:
    assert {"types", "model", "data.loader", "tokenizers.patch", "modalities.image", "__init__"} <= set(FILES)
    assert "data.loader" in ours(at_load(TREES["train"].body, False))
    assert "model" not in ours(at_load(TREES["__init__"].body, False))
    assert "model" in ours(at_load(TREES["__init__"].body, True))


def test_no_module_leads_back_to_itself() -> None:
    edges = {name: ours(at_load(tree.body, False)) - {name} for name, tree in TREES.items()}
    while ends := [name for name, targets in edges.items() if not targets & edges.keys()]:
        edges = {name: targets for name, targets in edges.items() if name not in ends}
    assert edges == {}, "these import each other in a circle, or import something that does"


def test_no_two_modules_import_each_other_even_for_types() -> None:
    edges = {(name, other) for name, tree in TREES.items() for other in ours(at_load(tree.body, True)) - {name}}
    assert sorted(pair for pair in edges if pair[0] < pair[1] and pair[::-1] in edges) == []


@each_file
def test_only_the_composing_modules_import_the_model(name: str) -> None:
    if name not in COMPOSING and not name.startswith("evaluate."):
        assert "model" not in ours(anywhere(TREES[name]))


@each_file
def test_only_the_trainer_knows_accelerate(name: str) -> None:
    def knows(nodes: Iterator[ast.Import | ast.ImportFrom]) -> bool:
        return any(n.split(".")[0] == "accelerate" for n in names(nodes))

    if name in ("saving", "resuming", "guard"):  # they are handed what the trainer made
        assert not knows(at_load(TREES[name].body, False))
    else:
        assert knows(anywhere(TREES[name])) == (name == "train") or name == "bench"


def test_the_hand_over_types_and_errors_import_nothing_of_ours() -> None:
    assert ours(anywhere(TREES["types"])) == set()
    assert ours(anywhere(TREES["errors"])) == set()


@each_file
def test_shelves_know_neither_each_other_nor_what_is_built_on_them(name: str) -> None:
    shelf = name.split(".")[0]
    if shelf not in LINKS:
        return
    other = {"tokenizers": "modalities", "modalities": "tokenizers"}[shelf]
    known = ours(anywhere(TREES[name]))
    assert not {n for n in known if n.split(".")[0] in {other, "model", "train", "objectives", "backbone", "heads"}}


@each_file
def test_the_engine_names_no_modality_and_no_tokenizer(name: str) -> None:
    """They are found by the rule of `m3.plugins`; an import by name would make one of them special."""
    if name.split(".")[0] not in LINKS:
        assert not {n for n in ours(anywhere(TREES[name])) if n.split(".")[0] in LINKS}


@each_file
def test_files_functions_and_parameter_lists_stay_short(name: str) -> None:
    assert len(FILES[name].read_text(encoding="utf-8").splitlines()) <= 400
    for node in ast.walk(TREES[name]):
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        lines = (node.end_lineno or node.lineno) - node.lineno + 1
        assert lines <= (120 if (name, node.name) == ("train", "train") else 60), f"{node.name}: {lines} lines"
        arguments = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
        own = [a.arg for a in arguments if a.arg not in ("self", "cls")]
        assert len(own) <= 8, f"{node.name} has {len(own)} parameters"
