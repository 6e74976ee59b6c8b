"""Hold cached decoding of length-dependent methods against decoding without a cache.

Run it as ``python benchmarks/cached_decoding.py CHECKPOINT TEXT`` with a Llama checkpoint trained
at 512 positions and a text of documents between ``<|endoftext|>`` marks. The families are tiny
random models; what stock transformers has of the methods is measured beside ours.
"""

import argparse
import math
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from real_weights import encode
from recording import record
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_rope_ext import patch_model, patched, planned, unpatch_model
from hf_rope_ext.models.sites import read_sites

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
import zoo
from decoding import FAMILIES, greedy, text
from method_knobs import PER_REQUEST
from method_knobs import knobs as knobs_of

STOCK = ("dynamic", "longrope")
BUCKETS = (1.05, 1.1, 1.25, 1.5, 2.0)


def knobs(method: str, pairs: int) -> dict[str, Any]:
    """Return the knobs of a method; of longrope, slowdowns from 1 to almost 3."""
    if method == "longrope":
        return {"factor": 4, "long_factor": [1 + 2 * pair / pairs for pair in range(pairs)]}
    return knobs_of(method, pairs)


def agreement(model: Any, ids: Tensor, new: int) -> float:
    """Return the share of new tokens that greedy decoding chooses with and without a cache."""
    start = ids.shape[1]
    found, expected = (
        greedy(model, ids, new, use_cache=cached)[:, start:] for cached in (True, False)
    )
    return float((found == expected).float().mean())


def stock_parameters(method: str, pairs: int, trained: int) -> dict[str, Any]:
    """Return the scaling keys of a stock config for a method, on top of the model's own."""
    own = {"rope_type": method, **knobs(method, pairs)}
    if method == "longrope":
        own |= {"short_factor": [1.0] * pairs, "original_max_position_embeddings": trained}
    return own


def on_families() -> dict[str, dict[str, float | str]]:
    """Return the agreement of every family and method, ours and stock's."""
    rows: dict[str, dict[str, float | str]] = {}
    for family in FAMILIES:
        model = zoo.build(family)
        geometry = read_sites(model)[0].geometry
        trained, pairs = geometry.original_max_position_embeddings, geometry.pairs
        ids, row = text(1, trained - 10), {}
        for method in PER_REQUEST:
            patch_model(model, method, **knobs(method, pairs))
            row[method] = agreement(model, ids, 30)
            unpatch_model(model)
        for method in STOCK:
            own = stock_parameters(method, pairs, trained)
            try:
                stock = zoo.build(family, lambda rope, own=own: {**rope, **own})
                row[f"stock {method}"] = agreement(stock, ids, 30)
            except Exception as error:  # stock refuses in many ways
                row[f"stock {method}"] = type(error).__name__
        rows[family] = row
        print(family, row)
    return rows


def on_checkpoint(checkpoint: Path, ids: Tensor) -> dict[str, float]:
    """Return the agreement of a trained model, from 480 to 1500 tokens."""
    prompt, new = ids[None, :480], 1020
    model = AutoModelForCausalLM.from_pretrained(checkpoint)
    model.generation_config.eos_token_id = None
    pairs, row = read_sites(model)[0].geometry.pairs, {}
    for method in PER_REQUEST:
        with patched(model, method, **knobs(method, pairs)):
            row[method] = agreement(model, prompt, new)
    for method in STOCK:
        config = AutoModelForCausalLM.from_pretrained(checkpoint).config
        own = stock_parameters(method, pairs, config.max_position_embeddings)
        config.rope_parameters = {**config.rope_parameters, **own}
        stock = AutoModelForCausalLM.from_pretrained(checkpoint, config=config)
        stock.generation_config.eos_token_id = None
        row[f"stock {method}"] = agreement(stock, prompt, new)
    print(row)
    return row


@torch.no_grad()
def loop(model: Any, ids: Tensor, prompt: int, length: int) -> Tensor:
    """Return the log-probabilities of a loop written by hand, token by token, float64."""
    out = model(ids[None, :prompt], use_cache=True)
    found, cache = [out.logits[0]], out.past_key_values
    for at in range(prompt, length):
        found.append(model(ids[None, at : at + 1], past_key_values=cache).logits[0])
    return torch.cat(found).double().log_softmax(-1)


def growth(model: Any, ids: Tensor) -> dict[str, dict[str, float]]:
    """Return what outgrowing a plan costs: a loop from 480 to 1500 tokens against the planned one.

    ``kl`` is the mean divergence of the next-token distribution from the planned loop's, in nats,
    over the tokens beyond the trained length; ``perplexity`` is over the same tokens.
    """
    prompt, length, trained = 480, 1500, 512
    texts = [ids[start : start + length] for start in range(0, 20 * length, 5 * length)]

    def measure(run: Callable[[Tensor], Tensor]) -> list[Tensor]:
        return [run(words)[trained:-1] for words in texts]

    def perplexity(found: list[Tensor]) -> float:
        losses = [
            -one.gather(-1, words[trained + 1 :, None])
            for one, words in zip(found, texts, strict=True)
        ]
        return math.exp(torch.cat(losses).mean())

    def exact(words: Tensor) -> Tensor:
        with planned(length):
            return loop(model, words, prompt, length)

    with patched(model, "dynamic_yarn", factor=4):
        reference = measure(exact)
    rows = {"planned": {"kl": 0.0, "perplexity": perplexity(reference)}}
    settings: dict[str, dict[str, Any]] = {
        **{f"rerotate, steps of {step}": {"buckets": step} for step in BUCKETS},
        "freeze": {"on_growth": "freeze"},
        "as transformers": {"compat": "transformers"},
    }
    for name, chosen in settings.items():
        with patched(model, "dynamic_yarn", factor=4, **chosen):
            found = measure(lambda words: loop(model, words, prompt, length))
        divergences = [
            (wanted.exp() * (wanted - one)).sum(-1)
            for wanted, one in zip(reference, found, strict=True)
        ]
        rows[name] = {
            "kl": float(torch.cat(divergences).mean()),
            "perplexity": perplexity(found),
        }
        print(name, rows[name])
    return rows


@torch.no_grad()
def by_position(model: Any, ids: Tensor) -> dict[str, list[float]]:
    """Return perplexity per 256 positions of whole requests of 512, 1024 and 2048 tokens."""
    rows = {}
    for length in (512, 1024, 2048):
        starts = torch.linspace(0, len(ids) - length - 1, 24).long().tolist()
        runs = {
            "none": {"method": "none"},
            "yarn": {"method": "yarn", "factor": 4.0},
            "yarn at the factor that fits": {"method": "yarn", "factor": length / 512},
            "dynamic_yarn": {"method": "dynamic_yarn", "factor": 4.0},
        }
        for name, arguments in runs.items():
            losses = []
            with patched(model, **arguments):
                for start in starts:
                    words = ids[start : start + length + 1]
                    logits = model(words[None, :-1], use_cache=False).logits[0]
                    losses.append(
                        torch.nn.functional.cross_entropy(logits, words[1:], reduction="none")
                    )
            mean = torch.stack(losses).double().mean(0).reshape(-1, 256).mean(-1)
            rows[f"{length} {name}"] = [round(value, 4) for value in mean.exp().tolist()]
            print(length, name, rows[f"{length} {name}"])
    return rows


def main() -> None:
    """Measure and write the result."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("text", type=Path)
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity(transformers.logging.CRITICAL)
    transformers.utils.logging.disable_progress_bar()
    torch.set_num_threads(1)
    ids = encode(AutoTokenizer.from_pretrained(arguments.checkpoint), arguments.text)
    model = AutoModelForCausalLM.from_pretrained(arguments.checkpoint)
    results = {
        "perplexity by position, per 256": by_position(model, ids),
        "families": on_families(),
        "checkpoint": on_checkpoint(arguments.checkpoint, ids),
        "growth": growth(model, ids),
    }
    record("cached_decoding", results)


if __name__ == "__main__":
    main()
