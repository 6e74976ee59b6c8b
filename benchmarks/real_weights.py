"""Hold a checkpoint that somebody else trained against stock transformers, method by method.

Run it as ``python benchmarks/real_weights.py CHECKPOINT TEXT`` with a Llama checkpoint and a text
of documents between ``<|endoftext|>`` marks. Stock models are built natively from a config, so the
two columns share nothing but the weights.
"""

import argparse
import math
from pathlib import Path
from typing import Any

import torch
from recording import record
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils.logging import disable_progress_bar

from hf_rope_ext import patched
from hf_rope_ext.evals.bench import Bench
from hf_rope_ext.evals.perplexity import Perplexity

FACTOR = 4.0
TIMES = (1, 2, 4, 8)
WINDOWS, TARGETS = 14, 256
METHODS = ("none", "linear", "ntk", "yarn")


def natively(checkpoint: Path, method: str) -> Any:
    """Return the checkpoint as transformers loads it with a method in its config."""
    model = AutoModelForCausalLM.from_pretrained(checkpoint)
    config = model.config
    theta, trained = config.rope_parameters["rope_theta"], config.max_position_embeddings
    width = config.head_dim
    parameters = {
        "none": {"rope_type": "default"},
        "linear": {"rope_type": "linear", "factor": FACTOR},
        "ntk": {"rope_type": "default"},
        "yarn": {
            "rope_type": "yarn",
            "factor": FACTOR,
            "original_max_position_embeddings": trained,
        },
    }[method]
    if method == "ntk":
        theta *= FACTOR ** (width / (width - 2))
    config.rope_parameters = {**parameters, "rope_theta": theta}
    return AutoModelForCausalLM.from_pretrained(checkpoint, config=config)


def encode(tokenizer: Any, text: Path) -> Tensor:
    """Return the tokens of all documents, each after the beginning-of-text token."""
    documents = (part.strip() for part in text.read_text(encoding="utf-8").split("<|endoftext|>"))
    ids: list[int] = []
    for document in filter(None, documents):
        words = tokenizer(document, add_special_tokens=False, verbose=False)["input_ids"]
        ids += [tokenizer.bos_token_id, *words]
    return torch.tensor(ids)


@torch.no_grad()
def stock_perplexities(model: Any, ids: Tensor, lengths: list[int]) -> list[float]:
    """Return perplexities from whole logits and transformers' own loss, window by window."""
    ends = torch.linspace(max(lengths), len(ids), WINDOWS, dtype=torch.float64).round().long()
    found = []
    for length in lengths:
        losses = []
        for end in ends.tolist():
            window = ids[None, end - length : end]
            labels = window.clone()
            labels[:, :-TARGETS] = -100
            losses.append(model(window, labels=labels).loss.item())
        found.append(math.exp(sum(losses) / len(losses)))
    return found


@torch.no_grad()
def main() -> None:
    """Measure and write the result."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("text", type=Path)
    arguments = parser.parse_args()
    disable_progress_bar()
    torch.set_num_threads(1)
    tokenizer = AutoTokenizer.from_pretrained(arguments.checkpoint)
    ids = encode(tokenizer, arguments.text)
    model = AutoModelForCausalLM.from_pretrained(arguments.checkpoint)
    trained = model.config.max_position_embeddings
    lengths = [times * trained for times in TIMES]
    bench = Bench(None, ids, max(lengths), windows=WINDOWS, targets=TARGETS)
    probe = ids[None, : 4 * trained]
    rows = {}
    for method in METHODS:
        stock = natively(arguments.checkpoint, method)
        knobs = {} if method == "none" else {"factor": FACTOR}
        with patched(model, method, **knobs):
            logits, expected = model(probe).logits, stock(probe).logits
            measured = [
                Perplexity().measure(bench, model, length, 1, lambda _: None) for length in lengths
            ]
        rows[method] = {
            "patched": [round(cell["perplexity"], 4) for cell in measured],
            "stock": [round(value, 4) for value in stock_perplexities(stock, ids, lengths)],
            "largest_relative_logit_difference": float(
                (logits - expected).abs().max() / expected.abs().max()
            ),
        }
        print(method, rows[method])
    record("real_weights", rows, lengths=lengths, factor=FACTOR, tokens=len(ids))


if __name__ == "__main__":
    main()
