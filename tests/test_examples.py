"""The examples run as they stand."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parent.parent / "examples"


def run(name):
    command = [sys.executable, str(EXAMPLES / f"{name}.py")]
    settings = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=settings, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize(
    ("name", "lines"),
    [
        ("read_further", ["2043 tokens", "yarn:      48213"]),
        ("save_for_stock_tools", ["written as: longrope", "llama.cpp: --rope-scaling yarn"]),
        ("read_images", ["1289 tokens, 329 positions", "factor 10.0703", "as it was: True"]),
        ("only_when_needed", ["  unchanged: True", "  factors [2.1484375]", "  factors [3.90625]"]),
    ],
)
def test_an_example_prints_what_it_promises(name, lines):
    output = run(name)

    for line in lines:
        assert line in output
    assert "unpatched: 48213" not in output
