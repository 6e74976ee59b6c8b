"""Memory, speed and accuracy of the chunked loss.

The training step of a small model with all logits and with the chunked loss; and the loss alone, in
four ways: with all logits, chunked by calling the head, by torch's ``linear_cross_entropy`` in the
dtype of its inputs, and by the same in float32 (what the package does for plain heads on CPUs).

Memory is the peak resident size of a fresh process over its size before the step. Time is that of
the process for one forward and backward, and the ways take turns. The oracle of the accuracy is
float64. Run it as ``python benchmarks/finetune_loss.py``.
"""

import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from recording import record
from torch import Tensor, nn
from torch.nn import functional
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

from hf_rope_ext import patch_model
from hf_rope_ext.finetune import add_adapter, chunked_loss
from hf_rope_ext.finetune.loss import chunked_cross_entropy, linear_cross_entropy

TOKENS, VOCABULARY, CHUNK, BLOCKS = 4096, 32_000, 512, 3
WIDTH = 576
# tokens and vocabulary; small in bfloat16, whose products a CPU without instructions for them
# computes over ten times more slowly
MEMORY_SIZES = {"float32": [(4096, 49_152), (2048, 151_936)], "bfloat16": [(1024, 8192)]}
SPEED_SIZES = {"float32": (2048, 49_152), "bfloat16": (512, 8192)}
SPEED_BLOCKS = 2
ACCURACY_SIZE, ACCURACY_CHUNK = (512, 8192), 32


def torch_cross_entropy(hidden: Tensor, labels: Tensor, head: nn.Linear, chunk: int) -> Tensor:
    """Return torch's chunked loss in the dtype of its inputs."""
    options = nn.LinearCrossEntropyOptions(batch_chunk_size=chunk)
    return functional.linear_cross_entropy(
        hidden, head.weight, labels, reduction="sum", options=options
    )


LOSSES: dict[str, Callable[[Tensor, Tensor, nn.Linear, int], Tensor]] = {
    "all logits": lambda hidden, labels, head, chunk: functional.cross_entropy(
        head(hidden).float(), labels, reduction="sum"
    ),
    "calls": lambda hidden, labels, head, chunk: chunked_cross_entropy(
        hidden, labels, head, (head.weight,), chunk
    ),
    "torch": torch_cross_entropy,
    "torch in float32": linear_cross_entropy,
}


def select_losses(dtype: str) -> list[str]:
    """Return the names of the losses that differ for a dtype."""
    return [side for side in LOSSES if dtype != "float32" or side != "torch"]


def build_inputs(
    size: tuple[int, int], dtype: str, trained: bool
) -> tuple[Tensor, Tensor, nn.Linear]:
    """Return hidden states, labels and a head of a number of tokens and a vocabulary."""
    torch.manual_seed(0)
    tokens, vocabulary = size
    head = nn.Linear(WIDTH, vocabulary, bias=False, dtype=getattr(torch, dtype))
    head.requires_grad_(trained)
    hidden = torch.randn(tokens, WIDTH, dtype=head.weight.dtype).requires_grad_()
    return hidden, torch.randint(0, vocabulary, (tokens,)), head


def build_model(adapter: str = "lora") -> Any:
    """Return a small patched model with a large vocabulary; ``"full"`` trains its head too."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=1024,
    )
    return add_adapter(patch_model(LlamaForCausalLM(config), "yarn", factor=4), adapter).train()


def read_status(name: str) -> int:
    """Return a size of this process, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(f"{name}:"))


def print_peak(step: Callable[[], Any]) -> None:
    """Print the bytes by which a step's peak exceeds what was resident before it."""
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak
    before = read_status("VmRSS")
    step()
    print(read_status("VmHWM") - before)


def train(side: str) -> None:
    """Print the peak of two steps of Trainer."""
    model = build_model()
    row = torch.randint(0, VOCABULARY, (TOKENS,))
    with ExitStack() as stack, tempfile.TemporaryDirectory() as output:
        if side == "chunked":
            stack.enter_context(chunked_loss(model, CHUNK))
        arguments = TrainingArguments(
            output_dir=output,
            max_steps=2,
            per_device_train_batch_size=1,
            report_to="none",
            save_strategy="no",
            use_cpu=True,
            dataloader_pin_memory=False,
            disable_tqdm=True,
        )
        rows = [{"input_ids": row, "labels": row}] * 2
        print_peak(Trainer(model=model, args=arguments, train_dataset=rows).train)


def measure_memory(*words: Any) -> int:
    """Return what this script prints last, called with these words in a fresh process."""
    command = [sys.executable, __file__, json.dumps(words)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return int(done.stdout.split()[-1])


def measure_model_speed(adapter: str) -> dict[str, Any]:
    """Return the plain step's time over the chunked one's, block by block."""
    model = build_model(adapter)
    ids = torch.randint(0, VOCABULARY, (1, TOKENS))
    losses: dict[str, float] = {}

    def seconds(side: str) -> float:
        with ExitStack() as stack:
            if side == "chunked":
                stack.enter_context(chunked_loss(model, CHUNK, probe=False))
            start = time.process_time()
            model.zero_grad()
            loss = model(input_ids=ids, labels=ids, use_cache=False).loss
            loss.backward()
            losses[side] = float(loss.detach())
            return time.process_time() - start

    seconds("plain"), seconds("chunked")
    ratios = []
    for _ in range(BLOCKS):
        took = [seconds(side) for side in ("plain", "chunked", "chunked", "plain")]
        ratios.append((took[0] + took[3]) / (took[1] + took[2]))
    return {
        "median": statistics.median(ratios),
        "least": min(ratios),
        "most": max(ratios),
        "blocks": BLOCKS,
        "losses": losses,
    }


def measure_head_speed(dtype: str, trained: bool) -> dict[str, Any]:
    """Return the seconds of forward and backward of each loss, the least of a few."""
    inputs = build_inputs(SPEED_SIZES[dtype], dtype, trained)
    seconds: dict[str, list[float]] = {side: [] for side in select_losses(dtype)}
    for _ in range(SPEED_BLOCKS):
        for side, taken in seconds.items():
            start = time.process_time()
            LOSSES[side](*inputs, CHUNK).backward()
            taken.append(time.process_time() - start)
    return {side: min(taken) for side, taken in seconds.items()}


def measure_accuracy(dtype: str) -> dict[str, Any]:
    """Return relative errors of loss and gradients against all logits in float64."""
    hidden, labels, head = build_inputs(ACCURACY_SIZE, dtype, trained=True)

    def run(loss: Any, hidden: Tensor, head: nn.Linear) -> tuple[Tensor, ...]:
        hidden = hidden.detach().requires_grad_()
        head.zero_grad()
        total = loss(hidden, labels, head, ACCURACY_CHUNK)
        total.backward()
        assert hidden.grad is not None
        assert head.weight.grad is not None
        return total.detach().double(), hidden.grad.double(), head.weight.grad.double()

    def oracle_loss(hidden: Tensor, labels: Tensor, head: nn.Linear, chunk: int) -> Tensor:
        return functional.cross_entropy(head(hidden), labels, reduction="sum")

    oracle = nn.Linear(WIDTH, ACCURACY_SIZE[1], bias=False, dtype=torch.float64)
    oracle.load_state_dict(head.state_dict())
    exact = run(oracle_loss, hidden.double(), oracle)
    return {
        side: {
            name: float((value - true).norm() / true.norm())
            for name, value, true in zip(
                ("loss", "gradient of hidden states", "gradient of weight"),
                run(LOSSES[side], hidden, head),
                exact,
                strict=True,
            )
        }
        for side in select_losses(dtype)
    }


def main() -> None:
    """Measure everything and write the result."""
    torch.set_num_threads(1)
    if len(sys.argv) > 1:
        side, *words = json.loads(sys.argv.pop())
        if not words:
            train(side)
            return
        size, dtype, trained = words
        inputs = build_inputs(size, dtype, trained)
        print_peak(lambda: LOSSES[side](*inputs, CHUNK).backward())
        return
    peaks = {side: measure_memory(side) for side in ("plain", "chunked")}
    heads = {"frozen head": False, "trained head": True}
    results = {
        "peak bytes over the start": peaks,
        "chunked memory over plain": peaks["chunked"] / peaks["plain"],
        "chunked speed over plain": measure_model_speed("lora"),
        "chunked speed over plain, head trained too": measure_model_speed("full"),
        "loss alone": {
            "peak bytes": {
                f"{dtype}, {size[0]} x {size[1]}, {name}": {
                    side: measure_memory(side, size, dtype, trained)
                    for side in select_losses(dtype)
                }
                for dtype, sizes in MEMORY_SIZES.items()
                for size in sizes
                for name, trained in heads.items()
            },
            "seconds": {
                "{}, {} x {}, {}".format(dtype, *size, name): measure_head_speed(dtype, trained)
                for dtype, size in SPEED_SIZES.items()
                for name, trained in heads.items()
            },
            "relative errors": {
                "{}, {} x {}, {} at once".format(dtype, *ACCURACY_SIZE, ACCURACY_CHUNK): (
                    measure_accuracy(dtype)
                )
                for dtype in SPEED_SIZES
            },
        },
    }
    settings = {"tokens": TOKENS, "vocabulary": VOCABULARY, "chunk": CHUNK, "width": WIDTH}
    print(record("finetune_loss", results, **settings))


if __name__ == "__main__":
    main()
