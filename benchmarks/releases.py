"""Run the core tests on several releases of transformers, each in an environment of its own.

``python benchmarks/releases.py oldest 5.20.0 newest`` has uv build ``.releases/<release>`` from its
cache of wheels, runs the tests marked `core` there, and fails if any of them does. The oldest
release comes with the lowest version that pyproject.toml allows of everything else, so that its
bounds are tested too; the others come with the newest. With ``--record`` it writes the result file
and renders the table of docs/releases.md.
"""

import argparse
import os
import re
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from importlib.metadata import requires, version
from pathlib import Path
from typing import Any

from recording import record
from uv import find_uv_bin

ROOT = Path(__file__).parent.parent
DEFAULT = ("oldest", "5.18.0", "5.20.0", "newest")
PACKAGES = ("transformers", "torch", "huggingface_hub", "peft", "accelerate", "lm_eval", "datasets")
TESTS = ["-m", "pytest", "--quiet", "--numprocesses", "auto", "-p", "no:cacheprovider"]
# `-m` here replaces that of pyproject.toml
TESTS += ["-m", "core and not slow and not gpu", "--junitxml"]
ENDS = ("failure", "error", "skipped")


def requirements(release: str) -> list[str]:
    """Return what uv is to install for a release."""
    # a range would bring a CUDA build of several gigabytes
    torch = f"torch=={version('torch').partition('+')[0]}"
    install = ["--editable", f"{ROOT}[dev]", torch]
    if release == "newest":
        return [*install, "transformers"]
    if release != "oldest":
        return [*install, f"transformers=={release}"]
    (bound,) = [name for name in requires("hf-rope-ext") or () if name.startswith("transformers")]
    return ["--resolution", "lowest-direct", *install, bound.replace(">=", "==")]


def run_uv(*words: str | Path) -> bool:
    """Return whether a command of uv succeeded."""
    settings = dict(os.environ)
    # uv reads no settings of pip, which may have been told where torch's CPU build lies
    settings.setdefault("UV_FIND_LINKS", settings.get("PIP_FIND_LINKS", "").replace(" ", ","))
    return subprocess.run([find_uv_bin(), *words], check=False, env=settings).returncode == 0


def run(release: str) -> dict[str, Any]:
    """Return the versions of one release's environment, and how its tests ended."""
    folder = ROOT / ".releases" / release
    python = folder / "bin" / "python"
    built = run_uv("venv", "--quiet", "--clear", "--python", sys.executable, folder) and run_uv(
        "pip", "install", "--quiet", "--python", python, *requirements(release)
    )
    if not built:
        versions = {**dict.fromkeys(PACKAGES, ""), "transformers": release}
        return {"versions": versions, "passed": 0, "skipped": 0, "failed": ["installation"]}
    code = f"from importlib.metadata import version; print(*map(version, {PACKAGES}))"
    found = subprocess.run([python, "-c", code], check=True, capture_output=True, text=True)
    report = folder / "tests.xml"
    settings = {**os.environ, "HF_HUB_OFFLINE": "1"}
    done = subprocess.run([python, *TESTS, report], cwd=ROOT, env=settings, check=False)
    versions = [one.partition("+")[0] for one in found.stdout.split()]
    return {
        "versions": dict(zip(PACKAGES, versions, strict=True)),
        **read_report(report, done.returncode),
    }


def read_report(report: Path, status: int) -> dict[str, Any]:
    """Return how many tests passed and were skipped, and which failed.

    Args:
        report: pytest's, in JUnit's form.
        status: pytest's exit status, which can tell of an error without a failing test.
    """
    cases = list(ElementTree.parse(report).iter("testcase")) if report.exists() else []
    ended = {kind: [case for case in cases if case.find(kind) is not None] for kind in ENDS}
    wrong = [*ended["failure"], *ended["error"]]
    failed = [f"{case.get('classname')}::{case.get('name')}" for case in wrong]
    if status and not failed:
        failed = [f"pytest ended with exit status {status}"]
    skipped = len(ended["skipped"])
    return {"passed": len(cases) - len(wrong) - skipped, "skipped": skipped, "failed": failed}


def render(results: dict[str, dict[str, Any]]) -> str:
    """Return the results as a Markdown table."""
    columns = (*PACKAGES, "passed", "skipped", "failed")
    lines = [f"| {' | '.join(columns)} |", f"|{'---|' * len(columns)}"]
    for found in results.values():
        counts = (found["passed"], found["skipped"], len(found["failed"]))
        cells = [found["versions"][name] for name in PACKAGES] + list(map(str, counts))
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> int:
    """Run the releases asked for; return 1 if a test failed on any."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("releases", nargs="*", help=f"by default {' '.join(DEFAULT)}")
    parser.add_argument("--record", action="store_true", help="write the result file and the table")
    asked = parser.parse_args()
    releases = asked.releases or list(DEFAULT)
    known = r"oldest|newest|\d+\.\d+\.\d+"
    if unknown := [name for name in releases if not re.fullmatch(known, name)]:
        parser.error(f"a release is three numbers, 'oldest' or 'newest', got {unknown[0]!r}")
    results = {release: run(release) for release in releases}
    print(render(results))
    for release, found in results.items():
        for test in found["failed"]:
            print(f"{release}: {test}")
    if asked.record:
        record("releases", results)
        page = ROOT / "docs" / "releases.md"
        start, end = "<!-- rendered by benchmarks/releases.py -->", "<!-- end of releases -->"
        before, _, rest = page.read_text().partition(start)
        page.write_text(f"{before}{start}\n{render(results)}\n{end}{rest.partition(end)[2]}")
    return int(any(found["failed"] for found in results.values()))


if __name__ == "__main__":
    sys.exit(main())
