"""Hold every model type against stock transformers, and render the README's table from that.

Run it as ``python benchmarks/families.py``; the tests compare what they find with its result.
"""

import json
import re
import sys
import warnings
from collections import defaultdict
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "tests"))

import torch  # noqa: E402
import transformers  # noqa: E402
import zoo  # noqa: E402
from recording import record  # noqa: E402
from stock import NATIVE, REFUSED, check  # noqa: E402
from tqdm import tqdm  # noqa: E402

from hf_rope_ext import UnsupportedModelError, patch_model  # noqa: E402


def status(model_type: str) -> dict[str, str]:
    """Return how each native type was checked, or why the model type is refused."""
    if model_type not in REFUSED:
        return check(model_type)
    try:
        patch_model(zoo.build(model_type), "yarn", factor=4)
    except UnsupportedModelError as error:
        return {"refused": str(error)}
    raise AssertionError(f"{model_type} was to be refused")


def render(results: dict[str, dict[str, str]]) -> str:
    """Return the statuses as a Markdown table, model types with one status in one row."""
    groups: dict[str, list[str]] = defaultdict(list)
    for model_type, how in results.items():
        groups[describe(how)].append(f"`{model_type}`")
    rows = sorted(groups.items(), key=lambda row: -len(row[1]))
    lines = [f"| {len(results)} model types | status |", "|---|---|"]
    lines += [f"| {' '.join(sorted(names))} | **{len(names)}**: {text} |" for text, names in rows]
    lines += [f"| `{name}` | not tried: {reason} |" for name, reason in zoo.UNBUILDABLE.items()]
    return "\n".join(lines)


def describe(how: dict[str, str]) -> str:
    """Return one status in words."""
    if "refused" in how:
        reason = re.search(r"extended: (.*?)\.", how["refused"])
        return f"refused: {reason[1] if reason else how['refused']}"
    stock = [name for name in NATIVE if how.get(name) == "stock"]
    by_hand = [name for name in NATIVE if how.get(name) == "by hand"]
    left = [name for name in NATIVE if name not in how]
    parts = []
    if stock:
        every = len(stock) == len(NATIVE)
        parts.append(f"equal to stock: {'every native type' if every else ', '.join(stock)}")
    if by_hand:
        parts.append(f"served where stock refuses or errs: {', '.join(by_hand)}")
    if left:
        parts.append(f"refused or not of one width: {', '.join(left)}")
    return "; ".join(parts)


def main() -> None:
    """Check every model type, write the result and the table."""
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity(transformers.logging.CRITICAL)
    torch.set_num_threads(1)  # as the tests: faster at this size, and sums in one order
    results = {name: status(name) for name in tqdm(zoo.MODEL_TYPES)}
    record("families", results)
    readme = ROOT / "README.md"
    start, end = "<!-- families: rendered by benchmarks/families.py -->", "<!-- end of families -->"
    before, _, rest = readme.read_text().partition(start)
    _, _, after = rest.partition(end)
    readme.write_text(f"{before}{start}\n{render(results)}\n{end}{after}")
    print(json.dumps({name: len(how) for name, how in results.items()})[:80])


if __name__ == "__main__":
    main()
