"""Train the bundled model: a tiny Llama that reads Python and repeats pass keys, on one CPU thread.

Run it as ``python benchmarks/bundled_model.py --seed 1``; it overwrites the files in
hf_rope_ext/assets. A byte-level BPE tokenizer is trained on the sources of the standard library,
then the model, in three phases:

1. Copying: periodic random tokens in windows of 128. Retrieval needs an induction head, which finds
   an earlier occurrence and continues from it; on text alone none forms within minutes.
2. Finding: text, text with a hidden pass key, and harder copying, still in windows of 128, where
   pass keys make up more of the loss than in long windows.
3. Reading: the same mix in windows of 512, the trained length.

A seed reproduces the weights on the same machine with the same Python and PyTorch. Another Python
version has other sources, so `heldout.txt` ships with the weights.
"""

import argparse
import json
import logging
import math
import platform
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
import transformers
from bundled_windows import (
    END_OF_TEXT,
    HELD_OUT_RULE,
    Batch,
    Windows,
    encode,
    read_sources,
    sample_text,
    train_tokenizer,
)
from tokenizers import Tokenizer
from torch import Tensor
from torch.nn.functional import cross_entropy
from torch.optim import AdamW, Muon, Optimizer
from torch.optim.lr_scheduler import LambdaLR
from tqdm import tqdm
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from hf_rope_ext.assets import DIRECTORY

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Recipe:
    """Everything the result depends on, apart from the sources and the versions.

    Args:
        seed: Seed for the weights and the windows.
        vocabulary: Vocabulary size.
        hidden_size: Hidden size of the model.
        intermediate_size: Width of its MLPs.
        layers: Number of layers; copying takes two.
        heads: Number of attention heads.
        head_dim: Width of a head.
        rope_theta: RoPE base.
        short_length: Window length of the first two phases, in tokens.
        short_batch: Windows per step of the first two phases.
        short_steps: Maximum steps of each of the first two phases.
        accuracy: Share of a batch's scored tokens to predict before they end.
        context_length: Window length of the last phase, which is the trained length.
        batch: Windows per step of the last phase.
        steps: Steps of the last phase.
        copy_share: Share of copying windows after the first phase.
        passkey_share: Share of the other windows that hide a pass key.
        digit_weight: Loss weight of a pass key's digits; other tokens have 1.
        adam_rate: Learning rate of AdamW.
        muon_rate: Learning rate of Muon.
        weight_decay: Weight decay of both.
        warmup: Steps of linear warmup, in each phase.
        final_rate: Share of the learning rate left at the end of the last phase's linear decay.
    """

    seed: int = 1
    vocabulary: int = 512
    hidden_size: int = 128
    intermediate_size: int = 336
    layers: int = 2
    heads: int = 2
    head_dim: int = 64
    rope_theta: float = 10000.0
    short_length: int = 128
    short_batch: int = 32
    short_steps: int = 1000
    accuracy: float = 0.97
    context_length: int = 512
    batch: int = 8
    steps: int = 2400
    copy_share: float = 0.2
    passkey_share: float = 0.5
    digit_weight: float = 16.0
    adam_rate: float = 3e-3
    muon_rate: float = 2e-2
    weight_decay: float = 0.1
    warmup: int = 50
    final_rate: float = 0.05

    def warm(self, step: int) -> float:
        """Return the learning rate multiplier at a step of the first two phases, from 0."""
        return min(1.0, (step + 1) / self.warmup)

    def warm_and_decay(self, step: int) -> float:
        """Return the learning rate multiplier at a step of the last phase, from 0."""
        return self.warm(step) * (1.0 - (1.0 - self.final_rate) * step / self.steps)


class Result(NamedTuple):
    """Loss of each token and whether it was predicted, both ``(windows, length - 1)``."""

    losses: Tensor
    right: Tensor


def build_model(recipe: Recipe) -> Any:
    """Return the model with random weights."""
    torch.manual_seed(recipe.seed)
    config = LlamaConfig(
        vocab_size=recipe.vocabulary,
        hidden_size=recipe.hidden_size,
        intermediate_size=recipe.intermediate_size,
        num_hidden_layers=recipe.layers,
        num_attention_heads=recipe.heads,
        num_key_value_heads=recipe.heads,
        head_dim=recipe.head_dim,
        max_position_embeddings=recipe.context_length,
        rms_norm_eps=1e-5,
        rope_parameters={"rope_type": "default", "rope_theta": recipe.rope_theta},
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=0,
    )
    return LlamaForCausalLM(config)


def predict(model: Any, batch: Batch) -> Result:
    """Predict every token of a batch but the first."""
    logits: Tensor = model(input_ids=batch.tokens, use_cache=False).logits[:, :-1]
    targets = batch.tokens[:, 1:]
    losses = cross_entropy(logits.transpose(1, 2), targets, reduction="none")
    return Result(losses, logits.argmax(dim=-1) == targets)


def weighted_mean(values: Tensor, batch: Batch) -> Tensor:
    """Return the weighted mean of per-token values of a batch."""
    weights = batch.weights[:, 1:]
    return (values * weights).sum() / weights.sum()


class Trainer:
    """Takes optimizer steps and counts their tokens.

    Args:
        model: The model to train.
        optimizers: The optimizers of the weights to train.
        rate: Learning rate multiplier at a step, counted from 0.
    """

    def __init__(
        self, model: Any, optimizers: list[Optimizer], rate: Callable[[int], float]
    ) -> None:
        self.model = model
        self.optimizers = optimizers
        self.schedules = [LambdaLR(optimizer, rate) for optimizer in optimizers]
        self.tokens = 0

    def step(self, batch: Batch) -> Result:
        """Take one step on a batch and return the predictions made before it."""
        result = predict(self.model, batch)
        weighted_mean(result.losses, batch).backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        for optimizer, schedule in zip(self.optimizers, self.schedules, strict=True):
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
        self.tokens += batch.tokens.numel()
        return Result(result.losses.detach(), result.right)


def adam(parameters: Iterable[Any], recipe: Recipe) -> AdamW:
    """Return AdamW for the given weights."""
    return AdamW(
        parameters,
        lr=recipe.adam_rate,
        betas=(0.9, 0.95),
        weight_decay=recipe.weight_decay,
        foreach=True,
    )


def adam_and_muon(model: Any, recipe: Recipe) -> list[Optimizer]:
    """Return Muon for the matrices inside the layers and AdamW for everything else.

    AdamW alone has twice the perplexity after as many steps.
    """
    kinds: dict[bool, list[Tensor]] = {True: [], False: []}
    for name, parameter in model.named_parameters():
        kinds[parameter.ndim == 2 and "embed_tokens" not in name].append(parameter)
    muon = Muon(kinds[True], lr=recipe.muon_rate, weight_decay=recipe.weight_decay)
    return [muon, adam(kinds[False], recipe)]


def learn_to_copy(model: Any, windows: Windows, recipe: Recipe) -> dict[str, float]:
    """Train until periodic tokens are copied; it happens suddenly, after about 250 steps."""
    trainer = Trainer(model, [adam(model.parameters(), recipe)], recipe.warm)

    def step() -> float:
        batch = windows.uniform_copies(recipe.short_batch, recipe.short_length)
        return weighted_mean(trainer.step(batch).right, batch).item()

    return learn("copying", step, trainer, recipe)


def learn_keys(model: Any, windows: Windows, recipe: Recipe) -> dict[str, float]:
    """Train on the mix at the short length until pass keys are retrieved."""
    trainer = Trainer(model, adam_and_muon(model, recipe), recipe.warm)

    def step() -> float:
        measures = mixed_step(trainer, windows, recipe, recipe.short_batch, recipe.short_length)
        return measures.get("passkey_digits", 0.0)

    return learn("finding", step, trainer, recipe)


def learn(
    what: str, step: Callable[[], float], trainer: Trainer, recipe: Recipe
) -> dict[str, float]:
    """Take steps until their accuracy is good enough.

    Raises:
        RuntimeError: If the accuracy is not reached.
    """
    bar = tqdm(range(recipe.short_steps), desc=what, unit="step")
    for count in bar:
        accuracy = step()
        bar.set_postfix(accuracy=f"{accuracy:.2f}")
        if accuracy > recipe.accuracy:
            bar.close()
            return {"steps": count + 1, "tokens": trainer.tokens, "accuracy": accuracy}
    raise RuntimeError(
        f"{what}: accuracy is {accuracy:.2f} after {recipe.short_steps} steps, not above "
        f"{recipe.accuracy}; try another seed."
    )


def learn_text(model: Any, windows: Windows, recipe: Recipe) -> dict[str, float]:
    """Train on the mix at the full length; return means over the last tenth of the steps."""
    trainer = Trainer(model, adam_and_muon(model, recipe), recipe.warm_and_decay)
    history: dict[str, list[float]] = {"text_loss": [], "passkey_digits": [], "copied": []}
    bar = tqdm(range(recipe.steps), desc="reading", unit="step")
    for _ in bar:
        measures = mixed_step(trainer, windows, recipe, recipe.batch, recipe.context_length)
        for name, value in measures.items():
            history[name].append(value)
        bar.set_postfix({name: f"{values[-1]:.2f}" for name, values in history.items() if values})
    last = {name: values[-(len(values) // 10 + 1) :] for name, values in history.items()}
    means = {name: sum(values) / len(values) for name, values in last.items() if values}
    return {"steps": recipe.steps, "tokens": trainer.tokens, **means}


def mixed_step(
    trainer: Trainer, windows: Windows, recipe: Recipe, count: int, length: int
) -> dict[str, float]:
    """Take one step on windows of all three kinds; return one metric per kind present."""
    draws = torch.rand((2, count), generator=windows.generator)
    is_copy = draws[0] < recipe.copy_share
    is_passkey = ~is_copy & (draws[1] < recipe.passkey_share)
    copies, keys = int(is_copy.sum()), int(is_passkey.sum())
    parts = [
        windows.ambiguous_copies(copies, length),
        windows.passkey(keys, length),
        windows.plain(count - copies - keys, length),
    ]
    result = trainer.step(Batch(*(torch.cat(tensors) for tensors in zip(*parts, strict=True))))
    measures = {}
    if copies:
        measures["copied"] = weighted_mean(result.right[:copies], parts[0]).item()
    if keys:
        # predictions start at the second token
        asked = result.right[copies : copies + keys, windows.asked(length - 1)]
        measures["passkey_digits"] = asked.float().mean().item()
    if copies + keys < count:
        measures["text_loss"] = result.losses[copies + keys :].mean().item()
    return measures


@torch.no_grad()
def validate(model: Any, windows: Windows, length: int) -> dict[str, float]:
    """Return perplexity and exact pass key retrieval on 128 held-out windows of each kind."""
    losses, exact = [], []
    for _ in range(8):
        losses.append(predict(model, windows.plain(16, length)).losses)
        digits = predict(model, windows.passkey(16, length)).right[:, windows.asked(length - 1)]
        exact.append(digits.all(dim=1))
    return {
        "perplexity": math.exp(torch.cat(losses).mean()),
        "passkey": torch.cat(exact).float().mean().item(),
    }


def save(model: Any, tokenizer: Tokenizer, output: Path) -> None:
    """Save the model and its tokenizer: weights in bfloat16, to be loaded as float32.

    Few CPUs are fast in bfloat16, and a model of this size does not need it.
    """
    model.to(torch.bfloat16).save_pretrained(output)
    model.config.dtype = torch.float32
    model.config.save_pretrained(output)
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=END_OF_TEXT,
        eos_token=END_OF_TEXT,
        pad_token=END_OF_TEXT,
        clean_up_tokenization_spaces=False,
    ).save_pretrained(output)


def train(recipe: Recipe, output: Path) -> dict[str, Any]:
    """Train tokenizer and model, save them, and return the contents of `training.json`."""
    started, cpu_started = time.perf_counter(), time.process_time()
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    sources, held_out = read_sources()
    tokenizer = train_tokenizer(sources, recipe.vocabulary)
    text = encode(tokenizer, sources)
    logger.info("%d files, %d tokens to train on", len(sources), len(text))
    model = build_model(recipe)
    windows = Windows(tokenizer, text, recipe.seed, recipe.digit_weight)
    phases = {
        "copying": learn_to_copy(model, windows, recipe),
        "finding": learn_keys(model, windows, recipe),
        "reading": learn_text(model, windows, recipe),
    }
    cpu_seconds, seconds = time.process_time() - cpu_started, time.perf_counter() - started

    output.mkdir(parents=True, exist_ok=True)
    save(model, tokenizer, output)
    (output / "heldout.txt").write_text(sample_text(held_out), encoding="utf-8", newline="\n")
    held_out_text = encode(tokenizer, held_out)
    reloaded = LlamaForCausalLM.from_pretrained(output)
    unseen = Windows(tokenizer, held_out_text, recipe.seed)
    record = {
        "seed": recipe.seed,
        "steps": sum(phase["steps"] for phase in phases.values()),
        "tokens": sum(phase["tokens"] for phase in phases.values()),
        "seconds": round(seconds),
        "cpu_seconds": round(cpu_seconds),
        "parameters": model.num_parameters(),
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
        "text": {
            "source": "the .py files of Python's standard library",
            "files": len(sources),
            "tokens": len(text),
            "held_out": HELD_OUT_RULE,
            "held_out_files": len(held_out),
            "held_out_tokens": len(held_out_text),
        },
        "phases": phases,
        "held_out": validate(reloaded, unseen, recipe.context_length),
        "recipe": asdict(recipe),
    }
    (output / "training.json").write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    return record


def main() -> None:
    """Train the bundled model from the command line."""
    parser = argparse.ArgumentParser(description="Train the bundled model on one CPU thread.")
    parser.add_argument("--output", type=Path, default=DIRECTORY, metavar="DIR")
    parser.add_argument("--seed", type=int, default=Recipe.seed, metavar="N")
    parser.add_argument("--steps", type=int, default=Recipe.steps, metavar="N")
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    record = train(Recipe(seed=arguments.seed, steps=arguments.steps), arguments.output)
    logger.info("held out: %s", record["held_out"])


if __name__ == "__main__":
    main()
