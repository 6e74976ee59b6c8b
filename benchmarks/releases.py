"""Run the core tests on several releases of transformers, each in an environment of its own.

``python benchmarks/releases.py 5.16.1 newest`` builds ``.releases/<release>``, runs the tests
marked `core` there, and fails if any of them does. With ``--record`` it writes the result file and
renders the table of docs/releases.md.
"""

import argparse
import os
import re
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from importlib.metadata import version
from pathlib import Path
from typing import Any

from recording import record

ROOT = Path(__file__).parent.parent
DEFAULT = ("5.16.1", "5.19.0", "5.20.0", "newest")
PACKAGES = ("transformers", "torch", "huggingface_hub", "peft", "accelerate", "lm_eval")
# what a release brings itself
FREE = ("transformers", "huggingface_hub", "tokenizers", "hf-xet", "torch")
TESTS = [
    "-m",
    "pytest",
    "--quiet",
    "--numprocesses",
    "auto",
    "-p",
    "no:cacheprovider",
    "--junitxml",
]
# `-m` here replaces that of pyproject.toml
CORE = "core and not slow and not gpu"
ENDS = ("failure", "error", "skipped")


def constraints(folder: Path, release: str) -> Path:
    """Write the tested versions of everything that does not depend on the release."""
    kept = [
        line
        for line in (ROOT / "constraints.txt").read_text().splitlines()
        if line.partition("==")[0] not in FREE
    ]
    # a range would bring a CUDA build of several gigabytes
    kept.append(f"torch=={version('torch').partition('+')[0]}")
    if release != "newest":
        kept.append(f"transformers=={release}")
    file = folder / "constraints.txt"
    file.write_text("\n".join(kept) + "\n")
    return file


def run(release: str) -> dict[str, Any]:
    """Return the versions of one release's environment, and how its tests ended."""
    folder = ROOT / ".releases" / release
    python = folder / "bin" / "python"
    subprocess.run([sys.executable, "-m", "venv", "--clear", folder], check=True)
    install = [python, *["-m", "pip", "install", "--quiet", "--constraint"]]
    install += [constraints(folder, release), "--editable", f"{ROOT}[dev]"]
    if subprocess.run(install, check=False).returncode:
        versions = {**dict.fromkeys(PACKAGES, ""), "transformers": release}
        return {"versions": versions, "passed": 0, "skipped": 0, "failed": ["installation"]}
    code = f"from importlib.metadata import version; print(*map(version, {PACKAGES}))"
    found = subprocess.run([python, "-c", code], check=True, capture_output=True, text=True)
    report = folder / "tests.xml"
    settings = {**os.environ, "HF_HUB_OFFLINE": "1"}
    done = subprocess.run([python, *TESTS, report, "-m", CORE], cwd=ROOT, env=settings, check=False)
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
    if unknown := [name for name in releases if not re.fullmatch(r"newest|\d+\.\d+\.\d+", name)]:
        parser.error(f"a release is three numbers or 'newest', got {unknown[0]!r}")
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
