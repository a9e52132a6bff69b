"""The budgets of the code's style, and the imports' direction."""

import ast
import statistics
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

ROOT = Path(__file__).parents[1]
ROOMS = [
    {"structures", "registry", "errors"},
    {"losses", "ops"},
    {"encoders", "decoders", "heads"},
    {"semantic_inference", "segmentor", "data", "evaluation"},
    {"engine", "inference", "visualization", "adaptive", "eco", "eco_tradeoff"},
    {"video"},
]
"""From the ground up: a module imports from its own row and from those above it in this list."""


@cache
def trees() -> dict[Path, ast.Module]:
    return {path: ast.parse(path.read_text()) for path in sorted((ROOT / "densepred").rglob("*.py"))}


def functions(node: ast.AST, public: bool = True) -> Iterator[tuple[ast.FunctionDef, bool]]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef):
            yield child, public and not child.name.startswith("_")
            yield from functions(child, False)
        else:
            yield from functions(child, public and not isinstance(child, ast.ClassDef))


def length(node: ast.FunctionDef) -> int:
    return node.end_lineno - node.lineno + 1


def test_functions_are_short():
    lengths = sorted(length(f) for tree in trees().values() for f, _ in functions(tree))
    assert lengths[-1] <= 80
    assert lengths[int(0.9 * (len(lengths) - 1))] <= 40
    assert statistics.median(lengths) <= 12


def test_files_are_short():
    long = {str(p): n for p in trees() if (n := p.read_text().count("\n")) > 500}
    long |= {str(p): n for p in (ROOT / "configs").glob("*.py") if (n := p.read_text().count("\n")) > 60}
    assert not long


def test_public_functions_are_annotated():
    bare = [
        f"{path}:{f.lineno} {f.name}"
        for path, tree in trees().items()
        for f, public in functions(tree)
        if public and (f.returns is None or any(a.annotation is None for a in f.args.args + f.args.kwonlyargs))
    ]
    assert not bare


def test_classes_are_shallow():
    classes = {n.name: n for tree in trees().values() for n in ast.walk(tree) if isinstance(n, ast.ClassDef)}

    def depth(name: str) -> int:
        bases = [b.id if isinstance(b, ast.Name) else getattr(b, "attr", "") for b in classes[name].bases]
        return 1 + max((depth(b) for b in bases if b in classes and b != name), default=0)

    assert not [name for name in classes if depth(name) > 2]


def imported(tree: ast.Module) -> Iterator[str]:
    for node in tree.body:
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("densepred"):
            yield node.module


def test_imports_run_one_way():
    floor = {room: i for i, rooms in enumerate(ROOMS) for room in rooms}
    wrong = []
    for path, tree in trees().items():
        room = path.relative_to(ROOT / "densepred").parts[0].removesuffix(".py")
        for name in imported(tree):
            target = name.split(".")[1] if "." in name else None
            if room in floor and target in floor and floor[target] > floor[room]:
                wrong.append(f"{path} imports {name}")
    assert not wrong


def test_core_imports_neither_torchvision_nor_timm_and_is_quick():
    code = (
        "import time, torch; start = time.process_time(); import densepred, sys;"
        "print(time.process_time() - start, 'torchvision' in sys.modules or 'timm' in sys.modules)"
    )
    runs = [
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
        for _ in range(2)
    ]
    seconds, forbidden = min(float(r.split()[0]) for r in runs), runs[0].split()[1]
    assert forbidden == "False"
    assert seconds < 3


def test_help_answers_at_once():
    code = "import sys; import densepred_cli; sys.exit('torch' in sys.modules or 'numpy' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
