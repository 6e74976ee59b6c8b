"""Time and memory of shifted sparse attention at 8192 tokens, beside full attention.

One attention layer, forward and backward, both sides in turn. Memory is the peak of a fresh process
over its size before. Full attention is torch's fused kernel, which stores no scores, and
transformers' eager attention, which does. Run it as
``python benchmarks/finetune_shifted.py``.
"""

import resource
import statistics
import subprocess
import sys
import time
from typing import Any

import torch
from recording import record
from torch import nn
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.models.llama.modeling_llama import eager_attention_forward

from hf_rope_ext.attention.shifted import _GROUPS, shifted_attention

TOKENS, HEADS, HEAD_DIM, GROUPS, BLOCKS = 8192, 4, 64, 4, 3
FULL = {"fused": sdpa_attention_forward, "eager": eager_attention_forward}


def make_layer() -> nn.Module:
    """Return a module with the attributes that the attention functions read."""
    module = nn.Module()
    module.is_causal, module.num_key_value_groups = True, 1
    setattr(module, _GROUPS, GROUPS)
    return module.train()


def run(side: str) -> None:
    """Attend once, forward and backward."""
    torch.manual_seed(0)
    shape = (1, HEADS, TOKENS, HEAD_DIM)
    query, key, value = (torch.randn(shape, requires_grad=True) for _ in range(3))
    function: Any = FULL.get(side, shifted_attention)
    mask = None
    if side == "eager":
        mask = torch.full((1, 1, TOKENS, TOKENS), -1e9).triu(1)
    out, _ = function(make_layer(), query, key, value, mask, dropout=0.0, scaling=HEAD_DIM**-0.5)
    out.sum().backward()


def measure_memory(side: str) -> int:
    """Return the bytes that a run adds to a fresh process."""
    command = [sys.executable, __file__, side]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return int(done.stdout.split()[-1])


def measure_seconds(side: str) -> float:
    """Return the processor time of a run, in seconds."""
    start = time.process_time()
    run(side)
    return time.process_time() - start


def main() -> None:
    """Measure everything and write the result."""
    torch.set_num_threads(1)
    if len(sys.argv) > 1:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        run(sys.argv[1])
        print(1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before))
        return
    peaks = {side: measure_memory(side) for side in ("shifted", *FULL)}
    times = {}
    for full in FULL:
        ratios = []
        for _ in range(BLOCKS):
            took = [measure_seconds(side) for side in (full, "shifted", "shifted", full)]
            ratios.append((took[1] + took[2]) / (took[0] + took[3]))
        times[full] = {
            "median": statistics.median(ratios),
            "least": min(ratios),
            "most": max(ratios),
        }
    results = {
        "shifted time over full": times,
        "shifted memory over full": {full: peaks["shifted"] / peaks[full] for full in FULL},
        "peak bytes over the start": peaks,
    }
    print(
        record(
            "finetune_shifted",
            results,
            tokens=TOKENS,
            heads=HEADS,
            head_dim=HEAD_DIM,
            groups=GROUPS,
            blocks=BLOCKS,
        )
    )


if __name__ == "__main__":
    main()
