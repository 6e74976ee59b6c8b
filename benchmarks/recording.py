"""What every benchmark records beside its numbers."""

import json
import platform
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

RESULTS = Path(__file__).parent / "results"


def record(name: str, results: Any, **settings: Any) -> Path:
    """Write ``results/name.json`` with command, commit, versions and machine.

    Args:
        name: Of the benchmark.
        results: Its numbers.
        **settings: What they depend on.

    Returns:
        The file.
    """
    script, *words = (Path(word).name if "/" in word else word for word in sys.argv)
    entry = {
        "benchmark": name,
        "command": " ".join(["python", f"benchmarks/{script}", *words]),
        "commit": _git("rev-parse", "HEAD") + ("-dirty" if _git("status", "--porcelain") else ""),
        "versions": {
            package: version(package) for package in ("hf-rope-ext", "torch", "transformers")
        },
        "python": platform.python_version(),
        "machine": platform.machine(),
        "threads": torch.get_num_threads(),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "settings": settings,
        "results": results,
    }
    path = RESULTS / f"{name}.json"
    path.write_text(json.dumps(entry, indent=2) + "\n")
    return path


def _git(*words: str) -> str:
    done = subprocess.run(["git", *words], capture_output=True, text=True, check=False)
    return done.stdout.strip()
