"""What is installed, and what importing it costs."""

import ast
import importlib
import re
import shutil
import subprocess
import sys
import zipfile
from importlib.metadata import packages_distributions
from importlib.resources import files
from pathlib import Path

import pytest
from packaging.requirements import Requirement

import hf_rope_ext

tomllib = importlib.import_module("tomllib" if sys.version_info >= (3, 11) else "tomli")

ROOT = Path(__file__).parent.parent
HEAVY = ("transformers", "peft", "accelerate", "datasets", "lm_eval", "matplotlib", "rich", "typer")


def loaded_by(statement):
    """The top-level modules that a fresh interpreter holds after a statement."""
    code = f"{statement}; import sys; print(*{{name.split('.')[0] for name in sys.modules}})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return set(done.stdout.split())


def test_importing_loads_torch_and_nothing_heavier():
    assert not loaded_by("import hf_rope_ext") & set(HEAVY)


def test_the_check_above_can_fail():
    assert "transformers" in loaded_by("import hf_rope_ext, transformers")


def test_every_public_name_is_there_once():
    assert len(set(hf_rope_ext.__all__)) == len(hf_rope_ext.__all__)
    assert all(hasattr(hf_rope_ext, name) for name in hf_rope_ext.__all__)


@pytest.mark.parametrize("package", ["hf_rope_ext.patches", "hf_rope_ext.eval_tasks"])
def test_parts_at_the_top_of_the_repository_are_installed_inside_the_package(package):
    assert files(package).joinpath("__init__.py").is_file()


def test_the_wheel_has_one_top_level_name_and_the_bundled_model(tmp_path):
    build = ["pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--wheel-dir"]
    command = [sys.executable, "-m", *build, str(tmp_path), str(ROOT)]
    subprocess.run(command, check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()

    assert {name.split("/")[0] for name in names if ".dist-info/" not in name} == {"hf_rope_ext"}
    for part in (
        "patches/__init__.py",
        "eval_tasks/__init__.py",
        "eval_tasks/_rope_yaml",
        "eval_tasks/rope_passkey.yaml",
        "methods/yarn.py",
        "cli/app.py",
        "assets/model.safetensors",
        "assets/tokenizer.json",
        "assets/heldout.txt",
        "py.typed",
    ):
        assert f"hf_rope_ext/{part}" in names
    assert [name for name in names if "/assets/" in name and name.endswith(".py")] == [
        "hf_rope_ext/assets/__init__.py"
    ]
    assert wheel.stat().st_size < 6_000_000


# a file, what is added to it, and what lint-imports then prints
WRONG_IMPORTS = {
    "upward": (
        "hf_rope_ext/geometry.py",
        "from hf_rope_ext.rotary.extended import ExtendedRotary",
        "hf_rope_ext.geometry -> hf_rope_ext.rotary.extended",
    ),
    "circle": (
        "hf_rope_ext/methods/method.py",
        "from hf_rope_ext.methods.cope import Cope",
        "No cycles are allowed in hf_rope_ext.methods",
    ),
    "unplaced": ("hf_rope_ext/helpers.py", "", "helpers"),
    "heavy": (
        "hf_rope_ext/positions/layouts.py",
        "import transformers",
        "hf_rope_ext.positions.layouts -> transformers",
    ),
    "family": (
        "patches/llama.py",
        "from hf_rope_ext.models.find import find_rotaries",
        "patches.llama -> hf_rope_ext.models.find",
    ),
}


@pytest.mark.parametrize(("file", "addition", "message"), WRONG_IMPORTS.values(), ids=WRONG_IMPORTS)
def test_a_wrong_import_breaks_a_contract(file, addition, message, tmp_path):
    for name in ("hf_rope_ext", "patches"):
        only_code = shutil.ignore_patterns("__pycache__", "assets")
        shutil.copytree(ROOT / name, tmp_path / name, ignore=only_code)
    (tmp_path / "hf_rope_ext" / "assets").mkdir()
    (tmp_path / "hf_rope_ext" / "assets" / "__init__.py").touch()
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    with (tmp_path / file).open("a") as source:
        source.write(addition)

    lint = [Path(sys.executable).with_name("lint-imports"), "--no-logo", "--no-cache"]
    done = subprocess.run(lint, cwd=tmp_path, capture_output=True, text=True, check=False)

    assert done.returncode != 0
    assert message in done.stdout


def load_project():
    return tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def normalize(name):
    return re.sub(r"[-_.]+", "-", name).lower()


def names_of(requirements):
    """The distributions that requirements name, without this package's own extras."""
    names = {normalize(Requirement(text).name) for text in requirements}
    return names - {"hf-rope-ext"}


def distribution_of(module):
    """The distribution that a module comes from; None for the standard library and this package."""
    top = module.partition(".")[0]
    if top in sys.stdlib_module_names or top == "hf_rope_ext":
        return None
    (distribution,) = DISTRIBUTIONS.get(top, [top])
    return normalize(distribution)


def find_sources():
    """Every source file, by the name that it is imported by."""
    folders = {name: ROOT / name for name in ("patches", "eval_tasks")}
    sources = {}
    for prefix, folder in {"": ROOT / "hf_rope_ext", **folders}.items():
        for path in folder.rglob("*.py"):
            parts = ["hf_rope_ext", prefix, *path.relative_to(folder).with_suffix("").parts]
            sources[".".join(part for part in parts if part not in ("", "__init__"))] = path
    return sources


SOURCES = find_sources()
DISTRIBUTIONS = {top: set(names) for top, names in packages_distributions().items()}


def is_deferred(node):
    """Whether what a node holds is not imported when its file is."""
    if isinstance(node, ast.If):
        return isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"
    return isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)


def imports_of(name, deferred):
    """The modules a source file imports at its top, and where ``deferred`` anywhere else too."""
    package = name if SOURCES[name].name == "__init__.py" else name.rpartition(".")[0]
    modules, nodes = set(), [ast.parse(SOURCES[name].read_text())]
    while nodes:
        node = nodes.pop()
        if isinstance(node, ast.Import):
            modules |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            module = node.module if not node.level else package
            modules |= {module, *(f"{module}.{alias.name}" for alias in node.names)}
        if deferred or not is_deferred(node):
            nodes += ast.iter_child_nodes(node)
    return modules


def loaded_with(name):
    """The distributions that importing a module of this package needs."""
    waiting, seen, distributions = {name}, set(), set()
    while waiting:
        module = waiting.pop()
        seen.add(module)
        imported = imports_of(module, deferred=False)
        distributions |= {distribution_of(other) for other in imported}
        packages = {other.rpartition(".")[0] for other in imported}
        waiting |= ((imported | packages) & set(SOURCES)) - seen
    return distributions - {None}


def test_what_is_imported_is_declared_and_what_is_declared_is_imported():
    project = load_project()
    declared = names_of(project["dependencies"])
    for extra, requirements in project["optional-dependencies"].items():
        declared |= names_of(requirements) if extra != "dev" else set()

    imported = {
        distribution_of(module) for name in SOURCES for module in imports_of(name, deferred=True)
    }

    assert imported - {None} == declared


@pytest.mark.parametrize(
    ("module", "extras"),
    [
        ("hf_rope_ext", []),
        ("hf_rope_ext.cli.app", []),
        ("hf_rope_ext.patches", []),
        ("hf_rope_ext.finetune.run", ["finetune"]),
        ("hf_rope_ext.evals.compare", []),
        ("hf_rope_ext.evals.plots", ["plot"]),
        ("hf_rope_ext.evals.lm_eval.model", ["eval"]),
    ],
)
def test_importing_a_module_takes_the_core_and_its_extra_alone(module, extras):
    project = load_project()
    allowed = names_of(project["dependencies"])
    for extra in extras:
        allowed |= names_of(project["optional-dependencies"][extra])

    assert loaded_with(module) <= allowed


def test_every_requirement_is_pinned_to_the_version_that_is_tested():
    project = load_project()
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pinned = {normalize(line.partition("==")[0]) for line in lines if not line.startswith("#")}
    required = names_of(project["dependencies"])
    for requirements in project["optional-dependencies"].values():
        required |= names_of(requirements)

    # liger-kernel needs a GPU
    assert required - pinned == {"liger-kernel"}
