"""What the chunked loss saves and costs: peak memory and time of a training step beside plain.

Memory is the peak resident size of a fresh process that trains two steps with the Trainer, over the
same process before its first step. Time is one forward and backward; both sides take turns. Run it
as ``python benchmarks/finetune_loss.py``.
"""

import resource
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack
from typing import Any

import torch
from recording import record
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

from hf_rope_ext import patch_model
from hf_rope_ext.finetune import chunked_loss, with_adapter

TOKENS, VOCABULARY, CHUNK, BLOCKS = 4096, 32_000, 512, 9


def build(adapter: str = "lora") -> Any:
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
    return with_adapter(patch_model(LlamaForCausalLM(config), "yarn", factor=4), adapter).train()


def step(model: Any, ids: torch.Tensor) -> float:
    """Run forward and backward and return the loss."""
    model.zero_grad()
    loss = model(input_ids=ids, labels=ids, use_cache=False).loss
    loss.backward()
    return float(loss.detach())


def peak(side: str) -> None:
    """Print the bytes that two steps of Trainer add to this process."""
    model = build()
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
        trainer = Trainer(
            model=model, args=arguments, train_dataset=[{"input_ids": row, "labels": row}] * 2
        )
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        trainer.train()
    print(1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before))


def memory(side: str) -> int:
    """Return what `peak` prints in a fresh process."""
    command = [sys.executable, __file__, side]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return int(done.stdout.split()[-1])


def speed(adapter: str) -> dict[str, Any]:
    """Return the plain step's time over the chunked one's, block by block."""
    model = build(adapter)
    ids = torch.randint(0, VOCABULARY, (1, TOKENS))
    losses: dict[str, float] = {}

    def seconds(side: str) -> float:
        with ExitStack() as stack:
            if side == "chunked":
                stack.enter_context(chunked_loss(model, CHUNK, probe=False))
            start = time.process_time()
            losses[side] = step(model, ids)
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


def main() -> None:
    """Measure everything and write the result."""
    torch.set_num_threads(1)
    if len(sys.argv) > 1:
        peak(sys.argv[1])
        return
    peaks = {side: memory(side) for side in ("plain", "chunked")}
    results = {
        "peak bytes over the start": peaks,
        "chunked memory over plain": peaks["chunked"] / peaks["plain"],
        "chunked speed over plain": speed("lora"),
        "chunked speed over plain, head trained too": speed("full"),
    }
    print(record("finetune_loss", results, tokens=TOKENS, vocabulary=VOCABULARY, chunk=CHUNK))


if __name__ == "__main__":
    main()
