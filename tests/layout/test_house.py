"""The house: names that must not shadow, imports that point one way, budgets."""

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SHELVES = ("tokenizers", "modalities", "recipes")
FILES = sorted([*(ROOT / "m3").rglob("*.py"), *(ROOT / "tokenizers").glob("*.py"), *(ROOT / "modalities").glob("*.py")])
FILES = [path for path in FILES if not any(parent.is_symlink() for parent in path.parents)]

# Lower stages first; a module may import only from its own line and the lines above.
ORDER = (
    {"errors"},
    {
        "processes",
        "machine",
        "matmul",
        "types",
        "random",
        "signals",
        "linear",
        "layer",
        "drawing",
        "sharded",
        "points",
        "samples",
        "codebook",
        "transport",
        "data.recording",
        "plugin_template",
        "overrides",
    },
    {"plugins", "parts", "unused"},
    {
        "positions",
        "attention",
        "scorers",
        "shaped_scorers",
        "spans",
        "targets",
        "config",
        "memory",
        "teachers",
        "quantize",
        "data.geometry",
        "data.clouds",
        "data.files",
        "data.remote",
        "value_tokens",
        "preemption",
    },
    {"data.world", "data.video", "data.sound", "data.words"},
    {"relative", "backbone", "windows", "masking", "modalities", "tokenizers"},
    {"maskings"},
    {"heads", "dense", "decoder", "coders", "recipe", "masker", "partners", "pooling", "sharing"},
    {
        "objectives",
        "data.source",
        "data.policies",
        "data.augment",
        "data.mixup",
        "data.manifest",
        "data.shards",
        "schedule",
        "checkpoint",
    },
    {
        "data.sources",
        "data.pack",
        "data.check",
        "data.loader",
        "data.stream",
        "encoder",
        "network",
        "progress",
        "provenance",
        "ema",
        "monitors",
        "card",
        "guard",
    },
    {"model", "metrics", "seeing"},
    {"build"},
    {"cost"},
    {"scale"},
    {"processor", "evaluate", "tokenizer_model", "own_teacher"},
    {"foreign"},
    {"formats"},
    {"convert", "initialise"},
    {"show", "inputs", "plot", "saving"},
    {"report", "resuming", "export"},
    {"train", "held_out", "measure", "side_by_side", "reconstruct", "embed", "tokenize_data"},
    {
        "summary",
        "table",
        "check",
        "doctor",
        "bench",
        "overhead",
        "compare",
        "step_compare",
        "runs",
        "bench_data",
        "bench_data_peers",
        "testing",
        "plugin_commands",
        "data.commands",
        "cli",
        "label_efficiency",
        "auto",
        "m3",
    },
)


def module_of(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    parts = parts[1:] if parts[0] == "m3" else parts
    return ".".join(part for part in parts if part != "__init__") or "m3"


def level(module: str) -> int:
    matches = [i for i, names in enumerate(ORDER) for n in names if module == n or module.startswith(f"{n}.")]
    assert matches, f"{module} has no place in the order of stages; give it one in this test"
    return max(matches) if module != "data" else 0


def imports(path: Path) -> list[str]:
    """Modules of ours that a file imports when it is loaded."""
    found = []
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "m3":
            base = (node.module or "").removeprefix("m3").strip(".")
            names = [f"{base}.{alias.name}".strip(".") for alias in node.names]
            found += [n if base in ("", "data", "evaluate") and _is_module(n) else base for n in names]
    return [name for name in found if name]


def _is_module(name: str) -> bool:
    path = ROOT / "m3" / name.replace(".", "/")
    return path.with_suffix(".py").is_file() or path.is_dir()


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_point_down(path: Path) -> None:
    own = module_of(path)
    if own in ("data", "auto", "m3"):
        return
    for other in imports(path):
        assert level(other) <= level(own), f"{own} imports {other}, a later stage"


def test_no_two_modules_import_each_other() -> None:
    edges = {(module_of(path), other) for path in FILES for other in imports(path)}
    assert [pair for pair in edges if (pair[1], pair[0]) in edges and pair[0] != pair[1]] == []


def test_only_the_trainer_knows_accelerate() -> None:
    knowing = [path.name for path in FILES if "accelerate" in _foreign(path)]
    assert knowing == ["guard.py", "resuming.py", "saving.py", "train.py"], "all but train.py for types only"


def _foreign(path: Path) -> set[str]:
    tree = ast.walk(ast.parse(path.read_text()))
    nodes = [node for node in tree if isinstance(node, ast.Import | ast.ImportFrom)]
    names = [n.module or "" if isinstance(n, ast.ImportFrom) else n.names[0].name for n in nodes]
    return {name.split(".")[0] for name in names}


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_budgets(path: Path) -> None:
    text = path.read_text()
    assert len(text.splitlines()) <= 400
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef):
            limit = 120 if path.name == "train.py" and node.name == "train" else 60
            assert node.end_lineno - node.lineno < limit, f"{node.name} is longer than {limit} lines"
            count = len([a for a in [*node.args.args, *node.args.kwonlyargs] if a.arg not in ("self", "cls")])
            assert count <= 8, f"{node.name} has {count} parameters"


def test_shelves_have_no_init_and_are_linked() -> None:
    for name in SHELVES:
        assert not (ROOT / name / "__init__.py").exists()
        assert os.readlink(ROOT / "m3" / name) == f"../{name}"


GUARD = "import tokenizers, m3.tokenizers.patch as p; assert tokenizers.Tokenizer and p.Patch; print('fine')"


def test_hugging_faces_tokenizers_is_not_shadowed_under_pytest() -> None:
    import tokenizers

    assert tokenizers.Tokenizer.__module__.startswith("tokenizers")


@pytest.mark.parametrize("launcher", ["python -c", "accelerate launch -m"])
def test_hugging_faces_tokenizers_is_not_shadowed(launcher: str, tmp_path: Path) -> None:
    command = [sys.executable, "-c", GUARD]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    if launcher != "python -c":
        (tmp_path / "guard_module.py").write_text(GUARD)
        environment["PYTHONPATH"] = f"{ROOT}{os.pathsep}{tmp_path}"
        command = [sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--num_processes", "1"]
        command += ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no", "-m", "guard_module"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120)
    assert "fine" in done.stdout, done.stderr[-2000:]


def test_importing_m3_is_light() -> None:
    heavy = ("torchvision", "torchaudio", "timm", "open_clip", "av")
    code = f"import m3, sys; print([x for x in {heavy} if x in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.stdout.strip() == "[]", done.stdout + done.stderr[-2000:]


def test_auto_classes_know_m3_after_the_import(tmp_path: Path) -> None:
    code = f"""
import m3
from pathlib import Path
from m3.check import shrink
from m3.processor import M3Processor
from m3.recipe import load_recipe
from m3.train import build_model
model = build_model(shrink(load_recipe("mae_tiny"), Path("unused")))
model.save_pretrained({str(tmp_path)!r}); M3Processor(model.config.modalities).save_pretrained({str(tmp_path)!r})
"""
    load = f"""
import m3
from transformers import AutoConfig, AutoModel, AutoProcessor
loaded = [c.from_pretrained({str(tmp_path)!r}) for c in (AutoConfig, AutoModel, AutoProcessor)]
print([type(x).__name__ for x in loaded])
"""
    for source in (code, load):
        done = subprocess.run([sys.executable, "-c", source], cwd=ROOT, capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.strip().endswith("['M3Config', 'M3Model', 'M3Processor']")


def test_the_wheel_works_outside_the_checkout(tmp_path: Path) -> None:
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
    source = tmp_path / "source"
    for name in tracked:
        target = source / name
        target.parent.mkdir(parents=True, exist_ok=True)
        if (ROOT / name).is_symlink():
            target.symlink_to(os.readlink(ROOT / name))
        else:
            target.write_bytes((ROOT / name).read_bytes())
    build = [
        sys.executable,
        "-m",
        "build",
        "--wheel",
        "--no-isolation",
        "--outdir",
        str(tmp_path / "dist"),
        str(source),
    ]
    subprocess.run(build, check=True, capture_output=True, timeout=240)
    (wheel,) = (tmp_path / "dist").glob("*.whl")
    code = (
        "import m3, pathlib; from m3.recipe import load_recipe; from m3.parts import find; "
        "assert 'site' in m3.__file__, m3.__file__; "
        "find('modalities', 'image'); find('tokenizers', 'class_patch'); print(load_recipe('quickstart').name)"
    )
    site = tmp_path / "site"
    subprocess.run([sys.executable, "-m", "zipfile", "-e", str(wheel), str(site)], check=True)
    environment = {**os.environ, "PYTHONPATH": str(site)}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120
    )
    assert done.stdout.strip() == "quickstart", done.stderr[-2000:]
