"""What a patch costs: prefill and decode beside the unpatched model, patching, importing.

The two sides take turns in one process, so that a machine whose speed drifts does not show. Run it
as ``python benchmarks/overhead.py``.
"""

import copy
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from typing import Any

import torch
from recording import record
from transformers import LlamaConfig, LlamaForCausalLM

from hf_rope_ext import patch_model, unpatch_model

SIZES = {"small": (256, 4, 4), "medium": (1024, 8, 8)}
METHODS = ("linear", "yarn", "ntk")
PROMPT, STEPS, BLOCKS = 512, 16, 31


def build(hidden: int, layers: int, heads: int) -> LlamaForCausalLM:
    """Return a random Llama of that size."""
    config = LlamaConfig(
        vocab_size=1024,
        hidden_size=hidden,
        intermediate_size=2 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=heads // 2,
        max_position_embeddings=512,
    )
    return LlamaForCausalLM(config).eval()


def seconds(call: Callable[[], Any]) -> float:
    """Return how long one call takes."""
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def ratios(first: Callable[[], Any], second: Callable[[], Any]) -> dict[str, float]:
    """Return the time of the first over that of the second, block by block.

    A block runs first, second, second, first: what drifts or favours one place in the order falls
    on both alike.
    """
    first(), second()
    found = []
    for _ in range(BLOCKS):
        took = [seconds(call) for call in (first, second, second, first)]
        found.append((took[0] + took[3]) / (took[1] + took[2]))
    quartiles = statistics.quantiles(found, n=4)
    return {"median": quartiles[1], "lower": quartiles[0], "upper": quartiles[2], "blocks": BLOCKS}


@torch.inference_mode()
def forward_ratios() -> dict[str, Any]:
    """Compare a patched model with its unpatched twin."""
    results: dict[str, Any] = {}
    ids = torch.randint(0, 1024, (1, PROMPT))
    for size, shape in SIZES.items():
        torch.manual_seed(0)
        plain = build(*shape)
        for method in METHODS:
            patched = patch_model(copy.deepcopy(plain), method, factor=4)

            def prefill(model: LlamaForCausalLM) -> Any:
                return model(ids, use_cache=True, logits_to_keep=1)

            caches = {model: prefill(model).past_key_values for model in (plain, patched)}

            def decode(model: LlamaForCausalLM, caches: dict[Any, Any] = caches) -> None:
                for _ in range(STEPS):
                    model(ids[:, :1], past_key_values=caches[model])
                caches[model].crop(-STEPS)

            results[f"{size} {method}"] = {
                "prefill": ratios(lambda p=patched: prefill(p), lambda p=plain: prefill(p)),
                "decode": ratios(lambda p=patched: decode(p), lambda p=plain: decode(p)),
            }
    return results


def patching_seconds() -> dict[str, float]:
    """Time patch_model and unpatch_model on 32 layers."""
    model = build(1024, 32, 8)
    took: dict[str, list[float]] = {"patch": [], "patch without probe": [], "unpatch": []}
    for _ in range(11):
        took["patch"].append(seconds(lambda: patch_model(model, "yarn", factor=4)))
        took["unpatch"].append(seconds(lambda: unpatch_model(model)))
        took["patch without probe"].append(
            seconds(lambda: patch_model(model, "yarn", factor=4, probe=False))
        )
        unpatch_model(model)
    return {name: statistics.median(times) for name, times in took.items()}


def import_ratio() -> dict[str, float]:
    """Time importing the package after torch, in fresh interpreters."""
    code = (
        "import time; a = time.perf_counter(); import torch; b = time.perf_counter();"
        "import hf_rope_ext; c = time.perf_counter(); print((c - b) / (b - a))"
    )
    with tempfile.TemporaryDirectory() as cache:
        environment = {**os.environ, "PYTHONPYCACHEPREFIX": cache}
        environment.pop("PYTHONDONTWRITEBYTECODE", None)
        found = [
            float(
                subprocess.run(
                    [sys.executable, "-c", code],
                    capture_output=True,
                    text=True,
                    check=True,
                    env=environment,
                ).stdout
            )
            for _ in range(8)
        ][1:]
    return {"added to import torch": statistics.median(found), "runs": len(found)}


def main() -> None:
    """Measure everything and write the result."""
    torch.set_num_threads(1)
    results = {
        "patched over unpatched": forward_ratios(),
        "seconds on 32 layers": patching_seconds(),
        "import": import_ratio(),
    }
    path = record("overhead", results, sizes=SIZES, methods=METHODS, prompt=PROMPT)
    print(path)


if __name__ == "__main__":
    main()
