"""What attention-side methods cost beside plain SDPA: prefill, decoding, peak memory.

Time is that of this process's CPU, and the two sides take turns; peak memory is that of a process
of its own for each. Run it as ``python benchmarks/attention_speed.py``.
"""

import argparse
import json
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
from recording import record
from transformers import AttentionInterface, LlamaConfig, LlamaForCausalLM
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from hf_rope_ext import patch_model, planned
from hf_rope_ext.attention import banded

METHODS = ("leaky_rerope", "rerope", "self_extend", "dca", "string", "streaming")
LENGTHS = (2048, 8192, 32768)
DECODED, STEPS = 8192, 16
LAYERS, HIDDEN, HEADS, KV_HEADS = 2, 576, 9, 3
"""Two layers of SmolLM2-135M."""


def build(length: int) -> LlamaForCausalLM:
    """Return a random model trained at a quarter of the length."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=1024,
        hidden_size=HIDDEN,
        intermediate_size=1536,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=KV_HEADS,
        max_position_embeddings=length // 4,
    )
    return LlamaForCausalLM(config).eval()


class Timed:
    """An attention that counts its CPU seconds."""

    def __init__(self, attention: Callable[..., Any]) -> None:
        self.attention = attention
        self.seconds = 0.0

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Attend."""
        start = time.process_time()
        try:
            return self.attention(*args, **kwargs)
        finally:
            self.seconds += time.process_time() - start


def measure(run: Callable[[], Any], attention: Timed) -> tuple[float, float]:
    """Return the CPU seconds of a run, and those of its attention."""
    attention.seconds = 0.0
    start = time.process_time()
    run()
    return time.process_time() - start, attention.seconds


@torch.inference_mode()
def times(length: int, method: str, rounds: int) -> dict[str, float]:
    """Compare prefill, and decoding where the length is that of it, with the unpatched model."""
    plain, model = build(length), build(length)
    patch_model(model, method, probe=False)
    clocks = {}
    for own, name, attention in (
        (plain, "sdpa", sdpa_attention_forward),
        (model, banded.NAME, banded.banded_attention),
    ):
        clocks[own] = Timed(attention)
        AttentionInterface.register(name, clocks[own])
    ids = torch.randint(0, 1024, (1, length))
    row = compare(
        {own: lambda own=own: own(ids, use_cache=False, logits_to_keep=1) for own in clocks},
        clocks,
        rounds,
    )
    if length == DECODED:
        with planned(length + 4 * STEPS):
            caches = {own: own(ids, use_cache=True, logits_to_keep=1).cache for own in clocks}

        def decode(own: Any) -> None:
            for _ in range(STEPS):
                own(ids[:, :1], cache=caches[own], position_ids=torch.tensor([[length]]))
            caches[own].crop(-STEPS)

        steps = {own: lambda own=own: decode(own) for own in clocks}
        row |= {f"decode {name}": value for name, value in compare(steps, clocks, rounds).items()}
    return row


def compare(runs: dict[Any, Callable[[], Any]], clocks: dict[Any, Timed], rounds: int) -> Any:
    """Return the ratios of the patched model over the plain one, medians of paired rounds."""
    plain, model = runs
    forward, attention = [], []
    for own in (plain, model):
        measure(runs[own], clocks[own])
    for _ in range(rounds):
        took = {own: measure(runs[own], clocks[own]) for own in (plain, model)}
        forward.append(took[model][0] / took[plain][0])
        attention.append(took[model][1] / took[plain][1])
    return {"forward": statistics.median(forward), "attention": statistics.median(attention)}


@torch.inference_mode()
def peak(length: int, method: str) -> float:
    """Return by how many MiB a prefill raises the peak of this process."""
    model = build(length)
    if method != "none":
        patch_model(model, method, probe=False)
    ids = torch.randint(0, 1024, (1, length))
    model(ids[:, :64], use_cache=False, logits_to_keep=1)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    model(ids, use_cache=False, logits_to_keep=1)
    return (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024


def peak_ratios(length: int, methods: tuple[str, ...]) -> dict[str, float]:
    """Return the peak of each method over that of the unpatched model."""
    peaks = {}
    for method in ("none", *methods):
        command = [sys.executable, __file__, "--peak", str(length), method]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        peaks[method] = float(done.stdout.splitlines()[-1])
    return {method: peaks[method] / peaks["none"] for method in methods} | {
        "MiB of none": peaks["none"]
    }


def main() -> None:
    """Measure and record."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--peak", nargs=2, metavar=("LENGTH", "METHOD"))
    parser.add_argument("--methods", nargs="+", default=METHODS)
    parser.add_argument("--lengths", nargs="+", type=int, default=LENGTHS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.peak:
        print(peak(int(options.peak[0]), options.peak[1]))
        return
    results: dict[str, Any] = {}
    for length in options.lengths:
        rows: dict[str, Any] = {}
        for method in options.methods:
            rows[method] = times(length, method, rounds=1 if length > DECODED else 5)
            print(length, method, rows[method], flush=True)
        for method, ratio in peak_ratios(length, tuple(options.methods)).items():
            rows.setdefault(method, {})
            rows[method] = ratio if method not in options.methods else rows[method]
            if method in options.methods:
                rows[method]["peak memory"] = ratio
        results[str(length)] = rows
        print(json.dumps(rows, indent=1), flush=True)
    path = record(
        "attention",
        results,
        layers=LAYERS,
        hidden=HIDDEN,
        heads=HEADS,
        kv_heads=KV_HEADS,
        decoded_after=DECODED,
    )
    print(path.name)


if __name__ == "__main__":
    main()
