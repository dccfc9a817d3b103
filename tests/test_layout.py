"""The house: what stands at the root, which way imports go, whose private names are used where."""

import ast
import importlib.metadata
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import ROOT

VERBS = ("data_process_utils", "train", "validation", "test")
ORDER = ("command files ranks compat", "config", "checkpoint", "pictures", "scoring", "training")  # low to high
LEVEL = {name: level for level, names in enumerate(ORDER) for name in names.split()}
OURS = sorted((ROOT / "animals").rglob("*.py")) + [ROOT / "config.py"]
PROGRAMS = [*ROOT.glob("*.py"), *(p for d in ("scripts", "demo", "benchmarks") for p in (ROOT / d).rglob("*.py"))]


def room(module):
    """`animals.scoring.report` -> `scoring`; a verb or another library -> its first name."""
    parts = module.split(".")
    return parts[1] if parts[0] == "animals" and len(parts) > 1 else parts[0]


def name_of(path):
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def imports(path):
    """Every module that a file imports, also within functions: `from a.b import c` is `a.b` and `a.b.c`."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path}: a relative import"
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def test_the_root_holds_the_users_five_scripts():
    assert {path.name for path in ROOT.glob("*.py")} == {"config.py", *(f"{verb}.py" for verb in VERBS)}


@pytest.mark.parametrize("path", OURS, ids=name_of)
def test_imports_go_down(path):
    own = LEVEL.get(room(name_of(path)), -1)  # animals/__init__.py imports nothing at all
    for module in imports(path):
        target = room(module)
        assert target not in VERBS, f"{path.name} imports the verb {module}"
        assert target not in ("scripts", "demo", "benchmarks", "tests"), f"{path.name} imports {module}"
        assert LEVEL.get(target, -1) <= own or module == "animals", f"{path.name} imports {module}, a higher room"


@pytest.mark.parametrize("path", [p for p in OURS if p.name == "__init__.py"], ids=name_of)
def test_a_rooms_sign_says_what_may_not_come_in(path):
    body = ast.parse(path.read_text(encoding="utf-8")).body
    assert len(body) == 1 and isinstance(body[0].value, ast.Constant), "a sign is a docstring and nothing else"
    assert 3 <= len(body[0].value.value.strip().splitlines()) <= 5


def test_no_name_hides_a_library():
    """A program's own folder comes first on sys.path: what lies in it is found before anything installed."""
    taken = set(sys.stdlib_module_names) | set(importlib.metadata.packages_distributions())
    mine = {path.stem for path in PROGRAMS} | {path.name for path in ROOT.iterdir() if path.is_dir()}
    assert mine & taken <= {"test", "tests", "__init__"}  # test.py is on the user's card; nobody imports Python's own


def private_uses(path):
    """`line: name` of each private name of another library; those of ours, and hooks overridden by super(), are not."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    own = {n.name for n in ast.walk(tree) if isinstance(n, ast.FunctionDef | ast.ClassDef)}
    own |= {n.attr for n in ast.walk(tree) if isinstance(n, ast.Attribute) and isinstance(n.ctx, ast.Store)
            and isinstance(n.value, ast.Name) and n.value.id in ("self", "cls")}  # fmt: skip
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and room(node.module) == node.module.split(".")[0] != "animals":
            names = [*node.module.split("."), *(alias.name for alias in node.names)]
            yield from (f"{node.lineno}: {name}" for name in names if name.startswith("_") and name != "__future__")
        elif isinstance(node, ast.Attribute) and node.attr.startswith("_") and not node.attr.endswith("__"):
            documented = node.attr in ("_asdict", "_replace") or ast.unparse(node) == "os._exit"
            if node.attr not in own and not documented:
                yield f"{node.lineno}: {node.attr}"


@pytest.mark.parametrize("path", [*OURS, *ROOT.glob("*.py"), *(ROOT / "scripts").glob("*.py")], ids=name_of)
def test_private_names_of_libraries_stand_in_compat_alone(path):
    if path.name != "compat.py":
        assert list(private_uses(path)) == []


@pytest.mark.parametrize("command", ["train.py", "validation.py", "test.py", "data_process_utils.py"])
def test_programs_run_from_any_folder(command, tmp_path):
    done = subprocess.run([sys.executable, ROOT / command, "--help"], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0 and "--input_dir" in done.stdout, done.stderr[-2000:]


@pytest.mark.parametrize("command", ["validation", "test", "data_process_utils"])
def test_help_imports_nothing_slow(command):
    code = (
        f"import sys; sys.argv = ['{command}.py', '--help']\n"
        f"import importlib.util as u; s = u.spec_from_file_location('program', '{command}.py')\n"
        "m = u.module_from_spec(s); s.loader.exec_module(m)\n"
        "try: m.main()\nexcept SystemExit: pass\n"
        "print([name for name in ('torch', 'trl', 'deepspeed', 'transformers') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.splitlines()[-1] == "[]", done.stderr[-2000:]


def test_scoring_imports_neither_trl_nor_deepspeed(demo):
    code = (
        "import sys, argparse; import validation; from animals.scoring.scorer import load_scorer; from config import "
        f"Config; load_scorer({str(demo.checkpoint)!r}, Config(), 'float32')\n"
        "print([name for name in ('trl', 'deepspeed') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.splitlines()[-1:] == ["[]"], done.stderr[-2000:]


def test_config_is_standard_library_only():
    code = (
        "import sys; before = set(sys.modules); import config\n"
        "new = [sys.modules[name] for name in set(sys.modules) - before]\n"
        "print([m for m in new if 'site-packages' in (getattr(m, '__file__', '') or '')])"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.strip() == "[]"


def test_nothing_speaks_of_another_machine():
    files = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True).stdout.split()
    for file in files:
        path = Path(ROOT, file)
        if path.suffix in (".py", ".sh", ".md", ".json", ".yaml", ".toml", ".txt", ".html") and path.exists():
            text = path.read_text(encoding="utf-8")
            assert "../" + "shared" not in text and "/work" + "/" not in text, file
