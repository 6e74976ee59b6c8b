"""The README's numbers are those of the committed results."""

import io
import json
from pathlib import Path

import pytest
from rich.console import Console

from hf_rope_ext import available_methods
from hf_rope_ext.evals.report import METRICS, load_report

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
RESULTS = ROOT / "benchmarks" / "results"


def result(name):
    return json.loads((RESULTS / f"{name}.json").read_text())["results"]


def printed(table):
    text = io.StringIO()
    Console(file=text, width=100, no_color=True).print(table)
    return "\n".join(line.rstrip() for line in text.getvalue().splitlines())


def test_the_demos_output_is_that_of_the_committed_report():
    report = load_report(RESULTS / "demo")

    for task in METRICS:
        assert printed(report.table(task)) in README


def test_every_method_is_in_the_table():
    for name in available_methods():
        assert f"`{name}`" in README


def test_the_overhead_is_the_measured_one():
    found = result("overhead")
    medians = [
        part["median"] for row in found["patched over unpatched"].values() for part in row.values()
    ]
    patching = found["seconds on 32 layers"]["patch"]

    assert f"{min(medians):.2f} to {max(medians):.2f}" in README
    assert f"{patching * 1000:.0f} ms" in README
    assert f"{found['import']['added to import torch']:.1%}" in README


def test_a_third_partys_checkpoint_computes_as_in_stock_transformers():
    for row in result("real_weights").values():
        assert row["largest_relative_logit_difference"] == 0.0
        assert row["patched"] == pytest.approx(row["stock"], rel=1e-6)
