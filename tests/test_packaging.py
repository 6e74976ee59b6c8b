"""What is installed, and what importing it costs."""

import subprocess
import sys
import zipfile
from importlib.resources import files
from pathlib import Path

import pytest

import hf_rope_ext

ROOT = Path(__file__).parent.parent
HEAVY = ("transformers", "peft", "accelerate", "datasets", "lm_eval", "matplotlib", "rich")


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
        "assets/model.safetensors",
        "assets/tokenizer.json",
        "assets/heldout.txt",
        "py.typed",
    ):
        assert f"hf_rope_ext/{part}" in names
    assert wheel.stat().st_size < 6_000_000


FLOORS = (
    {"errors", "geometry", "heads"},
    {"methods", "layouts"},
    {"lengths", "families", "parsing", "positions", "axial"},
    {"rotary", "sites", "visual"},
    {"table", "axes", "temperature", "checkpoint"},
    {"towers"},
    {"probe"},
    {"rerotation"},
    {"caching"},
    {"request", "deltas"},
    {"advice"},
    {"patching"},
    {"describe", "records", "measuring"},
    {"adapters"},
    {"loading"},
    {"export", "sizes"},
    {"assets", "evals", "planning"},
    {"finetune"},
    {"__init__", "__main__"},
)


def test_imports_point_down():
    floor_of = {name: number for number, floor in enumerate(FLOORS) for name in floor}
    package = ROOT / "hf_rope_ext"
    for path in package.rglob("*.py"):
        own = path.relative_to(package).parts[0].removesuffix(".py")
        for line in path.read_text().splitlines():
            words = line.split()
            if words[:1] == ["from"] and words[1].startswith("hf_rope_ext."):
                target = words[1].split(".")[1]
                assert target == own or floor_of[target] < floor_of[own], f"{path.name}: {line}"
