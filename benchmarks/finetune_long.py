"""Memory and tokens per second of a training step on a long sequence, beside the plain Trainer.

A Llama of about 200M parameters from config, patched to four times its trained length, with LoRA,
trained by transformers' Trainer on one sequence at a time. Each side runs in a fresh process;
running out of memory is recorded. Run it as ``python benchmarks/finetune_long.py`` on a machine
with a GPU; ``--tokens`` and ``--layers`` scale it down to a CPU.
"""

import argparse
import json
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
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainerCallback, TrainingArguments

from hf_rope_ext import patch_model
from hf_rope_ext.finetune import add_adapter, chunked_loss, use_shifted_attention
from hf_rope_ext.finetune.memory import is_out_of_memory

VOCABULARY, FACTOR, WARM = 128_256, 4, 2

SIDES: dict[str, dict[str, bool]] = {
    "plain": {},
    "plain, activation checkpointing": {"checkpointing": True},
    "chunked loss, activation checkpointing": {"checkpointing": True, "chunked": True},
    "the same, activations offloaded": {"checkpointing": True, "chunked": True, "offload": True},
    "the same, 4 shifted groups": {"checkpointing": True, "chunked": True, "shifted": True},
}


class Clock(TrainerCallback):  # type: ignore[misc]
    """Measures the time of each step."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self.start = 0.0

    def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
        """Start the clock."""
        _synchronize()
        self.start = time.perf_counter()

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        """Stop the clock."""
        _synchronize()
        self.seconds.append(time.perf_counter() - self.start)


def train(side: dict[str, bool], tokens: int, layers: int, steps: int) -> dict[str, Any]:
    """Return peak memory, tokens per second and the losses of a few steps."""
    torch.manual_seed(0)
    cuda = torch.cuda.is_available()
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=768,
        intermediate_size=3072,
        num_hidden_layers=layers,
        num_attention_heads=12,
        num_key_value_heads=4,
        max_position_embeddings=tokens // FACTOR,
        tie_word_embeddings=True,
    )
    with torch.device("cuda" if cuda else "cpu"):
        model: Any = LlamaForCausalLM(config).to(torch.bfloat16 if cuda else torch.float32)
    parameters = sum(weight.numel() for weight in model.parameters())
    model = add_adapter(patch_model(model, "yarn", factor=FACTOR))
    if side.get("shifted"):
        use_shifted_attention(model, 4)
    row = torch.randint(0, VOCABULARY, (tokens,))
    clock = Clock()
    with ExitStack() as stack, tempfile.TemporaryDirectory() as output:
        if side.get("chunked"):
            stack.enter_context(chunked_loss(model))
        arguments = TrainingArguments(
            output_dir=output,
            max_steps=WARM + steps,
            per_device_train_batch_size=1,
            bf16=cuda,
            report_to="none",
            save_strategy="no",
            logging_steps=1,
            use_cpu=not cuda,
            disable_tqdm=True,
            dataloader_pin_memory=cuda,
            activation_checkpointing=side.get("checkpointing", False),
            activation_checkpointing_kwargs={"offload": True} if side.get("offload") else None,
        )
        trainer = Trainer(
            model=model,
            args=arguments,
            train_dataset=[{"input_ids": row, "labels": row}] * (WARM + steps),
            callbacks=[clock],
        )
        trainer.train()
    return {
        "parameters": parameters,
        "peak bytes": _read_peak(),
        "tokens per second": tokens / statistics.median(clock.seconds[WARM:]),
        "losses": [entry["loss"] for entry in trainer.state.log_history if "loss" in entry],
    }


def _synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def _read_peak() -> int:
    """Return the peak of the GPU's memory, or of the process if there is none."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def main() -> None:
    """Measure each side in a fresh process and write the result."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, default=32_768)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--side", choices=SIDES, help="measure one side and print it")
    arguments = parser.parse_args()
    sizes = {"tokens": arguments.tokens, "layers": arguments.layers, "steps": arguments.steps}
    if arguments.side:
        try:
            print(json.dumps(train(SIDES[arguments.side], **sizes)))
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            print(json.dumps({"out of memory": True}))
        return
    results = {}
    words = [word for name, value in sizes.items() for word in (f"--{name}", str(value))]
    for side, how in SIDES.items():
        if how.get("offload") and not torch.cuda.is_available():
            continue
        command = [sys.executable, __file__, "--side", side, *words]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
        results[side] = json.loads(done.stdout.splitlines()[-1])
        print(side, results[side], flush=True)
    print(record("finetune_long", results, vocabulary=VOCABULARY, **sizes))


if __name__ == "__main__":
    main()
