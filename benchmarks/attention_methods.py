"""Hold methods that change the attention against YaRN: perplexity and pass keys by length.

Run it as ``python benchmarks/attention_methods.py CELLS [CHECKPOINT TEXT]``. Finished cells are
kept in the directory CELLS, so that an interrupted run resumes. Without a checkpoint it measures
the bundled model alone. The checkpoint is a Llama somebody else trained, and the text has documents
between ``<|endoftext|>`` marks; only perplexity is measured there. It writes the result file and
renders the tables of docs/attention.md.

Every seed has a third of the text and keys of its own. Perplexities are over the same tokens at
every length and under every method.
"""

import argparse
import math
import re
import statistics
from pathlib import Path
from typing import Any

import torch
from recording import record
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils.logging import disable_progress_bar

from hf_rope_ext.assets import DIRECTORY, TEXT
from hf_rope_ext.evals.compare import Comparison, compare
from hf_rope_ext.evals.report import Report
from hf_rope_ext.evals.statistics import wilson
from hf_rope_ext.methods import Method, make_method

PAGE = Path(__file__).parent.parent / "docs" / "attention.md"
FACTOR = 4.0
TIMES = (1, 2, 4)
SEEDS = 3
WINDOWS, TARGETS, SAMPLES = 8, 256, 16
CHARACTERS = 300_000
"""How much of a given text is used."""

FREQUENCIES = ("none", "yarn", "dynamic_yarn")
DISTANCES = (
    "rerope",
    "rerope+logn",
    "leaky_rerope",
    "leaky_rerope+logn",
    "self_extend",
    "self_extend+logn",
    "dca",
    "dca+temperature",
    "streaming",
)
MAPS = ("piecewise", "power", "ramp")
UNTRAINED = ("alibi", "nope", "xpos")
TAKE_FACTOR = ("yarn", "dynamic_yarn", *MAPS)
REFERENCE = "dynamic_yarn"


def methods(names: tuple[str, ...]) -> dict[str, Method]:
    """Return methods by name; those that do not follow the request are for four times."""
    return {
        name: make_method(name, **({"factor": FACTOR} if name in TAKE_FACTOR else {}))
        for name in names
    }


def read_parts(text: Path, tokenizer: Any) -> list[str]:
    """Return the text that each seed has, its documents after the tokenizer's first token."""
    words = text.read_text(encoding="utf-8")[:CHARACTERS]
    words = re.sub(r"\s*<\|endoftext\|>\s*", tokenizer.bos_token, words)
    size = len(words) // SEEDS
    return [words[size * seed : size * (seed + 1)] for seed in range(SEEDS)]


def measure(
    directory: Path, text: Path, cells: Path, times: tuple[int, ...], **chosen: Any
) -> list[Report]:
    """Return the report of each seed."""
    tokenizer = AutoTokenizer.from_pretrained(directory)
    model = AutoModelForCausalLM.from_pretrained(directory)
    trained = model.config.max_position_embeddings
    reports = []
    for seed, part in enumerate(read_parts(text, tokenizer)):
        comparison = Comparison(
            model=model,
            tokenizer=tokenizer,
            text=part,
            lengths=tuple(trained * one for one in times),
            windows=WINDOWS,
            targets=TARGETS,
            samples=SAMPLES,
            seed=seed,
            **chosen,
        )
        shown: set[Any] = set()

        def progress(
            cell: Any, done: int, total: int, seed: int = seed, shown: Any = shown
        ) -> None:
            if cell not in shown:
                shown.add(cell)
                print(f"seed {seed}: {done / total:.0%}", *vars(cell).values(), flush=True)

        reports.append(compare(comparison, cells / str(seed), progress))
    return reports


def perplexities(reports: list[Report]) -> dict[str, dict[str, Any]]:
    """Return perplexity over all tokens, that of each seed, and its ratio to that of a reference.

    The reference is dynamic YaRN where it was measured, else the unpatched model. A ratio is of the
    same tokens, so that its spread over seeds is not that of their texts.
    """
    methods = reports[0].methods
    reference = REFERENCE if REFERENCE in methods else "none"
    found: dict[str, dict[str, Any]] = {}
    for method in methods:
        for length in reports[0].lengths("perplexity"):
            own, other = (
                [report.cell(one, "perplexity", length)["nll"] for report in reports]  # type: ignore[index]
                for one in (method, reference)
            )
            ratios = [math.exp(a - b) for a, b in zip(own, other, strict=True)]
            found.setdefault(method, {})[str(length)] = {
                "all": math.exp(statistics.fmean(own)),
                "by seed": [math.exp(nll) for nll in own],
                f"over {reference}": {
                    "mean": statistics.fmean(ratios),
                    "stdev": statistics.stdev(ratios),
                },
            }
    return found


def passkeys(reports: list[Report]) -> dict[str, dict[str, Any]]:
    """Return the share of pass keys retrieved over all seeds, with Wilson's interval at 95 %."""
    found: dict[str, dict[str, Any]] = {}
    for method in reports[0].methods:
        for length in reports[0].lengths("passkey"):
            shares = [report.value(method, "passkey", length) for report in reports]
            share, count = statistics.fmean(shares), SAMPLES * len(shares)  # type: ignore[type-var]
            low, high = wilson(share, count)
            found.setdefault(method, {})[str(length)] = {
                "share": share, "low": low, "high": high, "keys": count, "by seed": shares
            }  # fmt: skip
    return found


def render(results: dict[str, Any]) -> dict[str, str]:
    """Return the results as Markdown tables, by name."""
    tables = {}
    for name, found in results.items():
        lengths = list(found["perplexity"]["none"])
        against = REFERENCE if REFERENCE in found["perplexity"] else "none"
        shown = " / ".join(lengths)
        heads = ["method", f"perplexity {shown}", f"at {lengths[-1]} over `{against}`"]
        if "passkey" in found:
            heads.append(f"pass keys in %, {shown}")
        lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
        lines += [row(found, method, lengths, against) for method in found["perplexity"]]
        tables[name] = "\n".join(lines)
    return tables


def row(found: dict[str, Any], method: str, lengths: list[str], against: str) -> str:
    """Return a row of a table."""
    own = found["perplexity"][method]
    ratio = own[lengths[-1]][f"over {against}"]
    cells = [
        f"`{method}`",
        " / ".join(f"{own[length]['all']:.4g}" for length in lengths),
        "" if method == against else f"{ratio['mean']:.3f} ± {ratio['stdev']:.3f}",
    ]
    if "passkey" in found:
        keys = found["passkey"][method]
        cells.append(
            " / ".join(
                f"{100 * keys[one]['share']:.0f} "
                f"({100 * keys[one]['low']:.0f} to {100 * keys[one]['high']:.0f})"
                for one in lengths
            )
        )
    return f"| {' | '.join(cells)} |"


def main() -> None:
    """Measure what has not been measured yet, and write the result."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("cells", type=Path, help="directory of finished cells")
    parser.add_argument("checkpoint", type=Path, nargs="?")
    parser.add_argument("text", type=Path, nargs="?")
    asked = parser.parse_args()
    if asked.checkpoint and not asked.text:
        parser.error("a checkpoint comes with a text of its own")
    disable_progress_bar()
    torch.set_num_threads(1)
    bundled, cells = (DIRECTORY, TEXT), asked.cells
    chosen = methods((*FREQUENCIES, *DISTANCES, *MAPS, *UNTRAINED))
    reports = measure(*bundled, cells / "bundled", TIMES, methods=chosen)
    results = {"bundled": {"perplexity": perplexities(reports), "passkey": passkeys(reports)}}
    reports = measure(*bundled, cells / "within", (1,), methods=methods(("none", "string")))
    results["within the trained length"] = {
        "perplexity": perplexities(reports),
        "passkey": passkeys(reports),
    }
    if asked.checkpoint:
        chosen = methods((*FREQUENCIES, *DISTANCES))
        where = (asked.checkpoint, asked.text, cells / "checkpoint", TIMES)
        reports = measure(*where, methods=chosen, tasks=("perplexity",))
        results["checkpoint"] = {"perplexity": perplexities(reports)}
    record(
        "attention_methods",
        results,
        factor=FACTOR,
        seeds=SEEDS,
        windows=WINDOWS,
        targets=TARGETS,
        samples=SAMPLES,
    )
    page = PAGE.read_text(encoding="utf-8")
    for name, table in render(results).items():
        start, end = (
            f"<!-- {name}, by benchmarks/attention_methods.py -->",
            f"<!-- end of {name} -->",
        )
        before, _, rest = page.partition(start)
        page = f"{before}{start}\n{table}\n{end}{rest.partition(end)[2]}"
    PAGE.write_text(page, encoding="utf-8")


if __name__ == "__main__":
    main()
