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
DEFAULT = ("5.16.1", "5.18.0", "5.20.0", "newest")
PACKAGES = (
    "transformers",
    "torch",
    "huggingface_hub",
    "tokenizers",
    "peft",
    "accelerate",
    "lm_eval",
)
# what a release brings itself
FREE = ("transformers", "huggingface_hub", "tokenizers", "hf-xet", "torch")


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
    """Return the versions and the counts of tests of one release."""
    folder = ROOT / ".releases" / release
    python = folder / "bin" / "python"
    subprocess.run([sys.executable, "-m", "venv", "--clear", folder], check=True)
    install = [python, "-m", "pip", "install", "--quiet", "--constraint"]
    subprocess.run(
        [*install, constraints(folder, release), "--editable", f"{ROOT}[dev]"], check=True
    )
    report = folder / "tests.xml"
    tests = [
        python,
        "-m",
        "pytest",
        "-m",
        "core and not slow and not gpu",
        "--quiet",
        "--numprocesses",
        "auto",
    ]
    tests += ["-p", "no:cacheprovider", f"--junitxml={report}"]
    done = subprocess.run(tests, cwd=ROOT, env={**os.environ, "HF_HUB_OFFLINE": "1"}, check=False)
    code = f"from importlib.metadata import version; print(*map(version, {PACKAGES}))"
    found = subprocess.run([python, "-c", code], check=True, capture_output=True, text=True)
    versions = dict(zip(PACKAGES, found.stdout.split(), strict=True))
    (suite,) = ElementTree.parse(report).getroot()
    counts = {key: int(suite.attrib[key]) for key in ("tests", "failures", "errors", "skipped")}
    return {"versions": versions, **counts, "passed": done.returncode == 0}


def render(results: dict[str, dict[str, Any]]) -> str:
    """Return the results as a Markdown table."""
    lines = [
        "| transformers | torch | huggingface_hub | peft | accelerate | lm-eval | core suite |",
        "|---|---|---|---|---|---|---|",
    ]
    for found in results.values():
        own = found["versions"]
        wrong = found["failures"] + found["errors"]
        passed = found["tests"] - wrong - found["skipped"]
        words = f"{passed} passed, {found['skipped']} skipped" + (
            f", {wrong} failed" if wrong else ""
        )
        shown = ("transformers", "torch", "huggingface_hub", "peft", "accelerate", "lm_eval")
        cells = [own[name].partition("+")[0] for name in shown]
        lines.append(f"| {' | '.join([*cells, words])} |")
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
    if asked.record:
        record("releases", results)
        page = ROOT / "docs" / "releases.md"
        start, end = "<!-- rendered by benchmarks/releases.py -->", "<!-- end of releases -->"
        before, _, rest = page.read_text().partition(start)
        page.write_text(f"{before}{start}\n{render(results)}\n{end}{rest.partition(end)[2]}")
    return 0 if all(found["passed"] for found in results.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
