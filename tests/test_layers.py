"""The architecture as a test: imports point one way, and ``import lipfast`` stays cheap."""

import ast
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent / "lipfast"
ORDER = [
    *["errors", "config", "locks", "ops", "engine", "images", "tasks", "priors", "masks", "fit"],
    *["tickets", "search", "restore", "doctor", "report", "demo", "bench", "cli"],
]


def imported_names(node: ast.AST) -> list[str]:
    if isinstance(node, ast.ImportFrom):  # spelled out, so that `from lipfast import search` is seen too
        return [f"{node.module}.{alias.name}" for alias in node.names]
    return [alias.name for alias in node.names] if isinstance(node, ast.Import) else []


def upward_imports(source: str, here: str) -> list[str]:
    wrong = []
    for node in ast.walk(ast.parse(source)):
        for name in imported_names(node):
            package, part = (f"{name}.").split(".")[:2]
            known = package == "lipfast" and here in ORDER and part in ORDER
            if known and ORDER.index(part) > ORDER.index(here):
                wrong.append(name)
    return wrong


def test_imports_only_point_down():
    wrong = {}
    for file in ROOT.rglob("*.py"):
        here = file.relative_to(ROOT).with_suffix("").parts[0]
        if upward := upward_imports(file.read_text(), here):
            wrong[str(file.relative_to(ROOT))] = upward
    assert not wrong


def test_the_check_sees_all_three_spellings():
    planted = "import lipfast.search\nfrom lipfast import search\nfrom lipfast.search.imp import find_tickets\n"
    assert len(upward_imports(planted, "ops")) == 3
    assert upward_imports(planted, "cli") == []


def test_every_part_has_its_place_in_the_order():
    parts = {path.stem for path in ROOT.iterdir() if path.suffix == ".py" or (path / "__init__.py").exists()}
    assert parts - {"__init__", "__main__"} <= set(ORDER)


def test_import_lipfast_loads_no_heavy_package():
    code = "import sys, lipfast; print([m for m in ('torch', 'numpy', 'matplotlib', 'typer') if m in sys.modules])"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"


def test_public_names_exist():
    import lipfast

    for name in lipfast.__all__:
        assert getattr(lipfast, name) is not None


def test_public_parts_load_when_they_are_named():
    program = "import lipfast; lipfast.fit.FitConfig; lipfast.search.SearchConfig; lipfast.images.read"
    subprocess.run([sys.executable, "-c", program], check=True)
