"""The house: what stands at the root, which way imports go, which environment variables and private names are used."""

import ast
import importlib.metadata
import re
import subprocess
import sys

import pytest

from tests.conftest import ROOT

SCRIPTS = ("data_process_utils", "train", "validation", "test")
ORDER = ("command files ranks compat", "config", "checkpoint", "pictures", "scoring", "training")  # low to high
LEVEL = {name: level for level, names in enumerate(ORDER) for name in names.split()}
OURS = sorted((ROOT / "animals").rglob("*.py")) + [ROOT / "config.py"]
COMMANDS = [*ROOT.glob("*.py"), *(ROOT / "scripts").glob("*.py")]
PROGRAMS = [*COMMANDS, *(path for folder in ("demo", "benchmarks") for path in (ROOT / folder).rglob("*.py"))]
VARIABLES = {"NUM_PROCESSES": "launch.py", "BF16_ON_CPU": "ranks.py"}  # ours, and the only file that reads each
OTHERS = """RANK WORLD_SIZE LOCAL_SIZE LOCAL_WORLD_SIZE CUDA_VISIBLE_DEVICES TORCHELASTIC_RUN_ID PET_SIGNALS_TO_HANDLE
SIGQUIT CC OMP_NUM_THREADS PYTORCH_ALLOC_CONF DS_ACCELERATOR TENSORBOARD_LOGGING_DIR TORCH_EXTENSIONS_DIR MPLCONFIGDIR
TRITON_CACHE_DIR HF_DATASETS_CACHE HF_HUB_OFFLINE TORCHDYNAMO_DISABLE TQDM_DISABLE PYTHONWARNINGS LC_ALL LC_MESSAGES
LANG VIRTUAL_ENV CONDA_PREFIX"""


def room(module):
    """`animals.scoring.report` -> `scoring`; another module -> its first name."""
    return module.removeprefix("animals.").split(".")[0]


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


def reached(path, seen):
    """`seen`, and with it every file of ours that `path` imports, directly or not, lazily or not."""
    for module in imports(path):
        place = ROOT / module.replace(".", "/")
        for file in (place.with_suffix(".py"), place / "__init__.py"):
            if file.is_file() and file not in seen:
                seen.add(file)
                reached(file, seen)
    return seen


def test_the_root_holds_the_users_five_scripts():
    assert {path.name for path in ROOT.glob("*.py")} == {"config.py", *(f"{name}.py" for name in SCRIPTS)}


@pytest.mark.parametrize("path", OURS, ids=name_of)
def test_imports_go_down(path):
    own = LEVEL.get(room(name_of(path)), -1)  # animals/__init__.py imports nothing at all
    for module in imports(path):
        target = room(module)
        assert target not in (*SCRIPTS, "scripts", "demo", "benchmarks", "tests"), f"{path.name} imports {module}"
        assert LEVEL.get(target, -1) <= own or module == "animals", f"{path.name} imports {module}, a higher room"


@pytest.mark.parametrize("path", PROGRAMS, ids=name_of)
def test_nothing_imports_a_command(path):
    assert not [module for module in imports(path) if room(module) in ("scripts", *SCRIPTS)]


@pytest.mark.parametrize("script", SCRIPTS)
def test_what_a_script_does_not_need_it_does_not_import(script):
    found = {name_of(file) for file in reached(ROOT / f"{script}.py", set())}
    assert "animals.scoring.features" not in found
    assert "animals.scoring.sheet" not in found or script == "test"
    assert script == "train" or not [name for name in found if name.startswith("animals.training")]


@pytest.mark.parametrize("path", [*OURS, *COMMANDS, *ROOT.glob("*.sh"), ROOT / "scripts/environment.sh"], ids=str)
def test_which_environment_variables_are_read(path):
    shell = path.suffix == ".sh"
    line, name = ("", r"\$\{?([A-Z_]+)") if shell else ("environ|getenv", r"""["']([A-Z][A-Z_\d]+)["']""")
    lines = [text for text in path.read_text(encoding="utf-8").splitlines() if re.search(line, text)]
    found = {variable for text in lines for variable in re.findall(name, text.partition("#")[0])}
    assert found - set(OTHERS.split()) <= {variable for variable, file in VARIABLES.items() if file == path.name}


@pytest.mark.parametrize("path", [p for p in OURS if p.name == "__init__.py"], ids=name_of)
def test_a_rooms_sign_says_what_may_not_come_in(path):
    body = ast.parse(path.read_text(encoding="utf-8")).body
    assert len(body) == 1 and isinstance(body[0].value, ast.Constant), "a sign is a docstring and nothing else"
    assert 3 <= len(body[0].value.value.strip().splitlines()) <= 5


def test_no_name_hides_a_library():
    """A program's own folder comes first on sys.path: what lies in it is found before anything installed."""
    installed = set(sys.stdlib_module_names) | set(importlib.metadata.packages_distributions())
    mine = {path.stem for path in PROGRAMS} | {path.name for path in ROOT.iterdir() if path.is_dir()}
    assert mine & installed <= {"test", "tests", "__init__"}  # test.py is the user's; nobody imports Python's own


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


@pytest.mark.parametrize("path", [*OURS, *COMMANDS], ids=name_of)
def test_private_names_of_libraries_stand_in_compat_alone(path):
    assert path.name == "compat.py" or list(private_uses(path)) == []


def python(code):
    """The last line that this code prints, run at the root by a Python of its own."""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout, done.stderr[-2000:]
    return done.stdout.splitlines()[-1]


@pytest.mark.parametrize("script", SCRIPTS)
def test_scripts_run_from_any_folder(script, tmp_path):
    command = [sys.executable, ROOT / f"{script}.py", "--help"]
    assert "--input_dir" in subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True).stdout


@pytest.mark.parametrize("script", sorted(set(SCRIPTS) - {"train"}))
def test_help_imports_nothing_slow(script):
    code = f"import runpy, sys; sys.argv[1:] = ['--help']\ntry: runpy.run_path('{script}.py', None, '__main__')"
    loaded = "[name for name in ('torch', 'trl', 'deepspeed', 'transformers') if name in sys.modules]"
    assert python(f"{code}\nexcept SystemExit: print({loaded})") == "[]"


def test_scoring_imports_neither_trl_nor_deepspeed(demo):
    code = (
        "import sys, validation; from animals.scoring.scorer import load_scorer; from config import Config\n"
        f"load_scorer({str(demo.checkpoint)!r}, Config(), 'float32')\n"
        "print([name for name in ('trl', 'deepspeed') if name in sys.modules])"
    )
    assert python(code) == "[]"


def test_config_is_standard_library_only():
    code = (
        "import sys; before = set(sys.modules); import config\n"
        "new = [sys.modules[name] for name in set(sys.modules) - before]\n"
        "print([m for m in new if 'site-packages' in (getattr(m, '__file__', '') or '')])"
    )
    assert python(code) == "[]"


def test_no_file_names_another_machines_folders():
    strings = ("-e", "../" + "shared", "-e", "/work" + "/")
    kinds = ("*.py", "*.sh", "*.md", "*.json", "*.yaml", "*.toml", "*.txt", "*.html")
    done = subprocess.run(["git", "grep", "-lF", *strings, "--", *kinds], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout == ""
