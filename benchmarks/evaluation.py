"""Cost of an evaluation compared with bare forward passes, a plain loop and stock lm-eval.

Run ``python benchmarks/evaluation.py [MODEL TEXT]``; the default is the bundled model and text.
Part ``time`` runs 5 methods x 4 lengths x 5 depths of pass keys and perplexity in four ways,
alternating; part ``memory`` measures the peak memory of scoring a window with a vocabulary of 150k.
Ways whose start-up time a user has to wait for run in processes of their own.

``--vocabulary N`` pads the model's vocabulary with unused tokens: with layers as small as those of
the bundled model, logits then dominate the time, as they dominate the memory of a real model.
"""

import argparse
import json
import math
import os
import random
import resource
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from recording import record

from hf_rope_ext import patched
from hf_rope_ext.assets import DIRECTORY, TEXT
from hf_rope_ext.evals.compare import Comparison, compare
from hf_rope_ext.evals.documents import build_dataset
from hf_rope_ext.evals.tasks.base import Place
from hf_rope_ext.evals.tasks.passkey import Passkey
from hf_rope_ext.evals.text import encode_pair, read_text, tokenize
from hf_rope_ext.parsing import parse_methods
from hf_rope_ext.saving.loading import load_unpatched

METHODS = "none,linear,ntk,ntk_by_parts,yarn"
FACTOR = 4.0
# the prompt alone takes about 200 tokens with a small vocabulary
LENGTHS = (256, 512, 1024, 2048)
DEPTHS = (0.0, 0.25, 0.5, 0.75, 1.0)
SAMPLES, WINDOWS, TARGETS = 5, 4, 64
VOCABULARY, MEMORY_LENGTHS = 150_000, (2048, 4096)


def build(model: str, text: Path) -> Comparison:
    """Return the comparison that every way performs."""
    loaded, tokenizer = load_unpatched(model, device="cpu", dtype="float32")
    return Comparison(
        model=loaded.eval(),
        tokenizer=tokenizer,
        text=read_text(text),
        methods=parse_methods(METHODS, FACTOR),
        lengths=LENGTHS,
        tasks=("perplexity", "rope_passkey_ll"),
        samples=SAMPLES,
        windows=WINDOWS,
        targets=TARGETS,
    )


def rows(comparison: Comparison) -> dict[int, list[tuple[list[int], int]]]:
    """Return the token rows of all cells and their target counts, by length."""
    tokenizer = comparison.tokenizer
    ids = tokenize(tokenizer, comparison.text)
    by_length = {}
    for length in LENGTHS:
        documents = build_dataset("rope_passkey_ll", tokenizer, [length], SAMPLES, comparison.seed)
        by_length[length] = [
            encode_pair(tokenizer, d["prompt"] + d["answer"], d["target"]) for d in documents
        ]
        ends = torch.linspace(max(LENGTHS), len(ids), WINDOWS, dtype=torch.float64).round().long()
        by_length[length] += [(ids[end - length : end].tolist(), TARGETS) for end in ends.tolist()]
    return by_length


@torch.inference_mode()
def bare(comparison: Comparison, data: dict[int, list[tuple[list[int], int]]]) -> None:
    """Run one forward pass per row and nothing else."""
    for method in comparison.methods.values():
        with patched(comparison.model, method) as model:
            for rows_of_length in data.values():
                for ids, targets in rows_of_length:
                    model(
                        input_ids=torch.tensor([ids]), use_cache=False, logits_to_keep=targets + 1
                    )


@torch.inference_mode()
def plain_loop(directory: str, text: str) -> None:
    """Do what a simple script does.

    Load the model for each method, build each question sentence by sentence, answer it with
    ``generate``, and compute all logits of each window of text.
    """
    for method in parse_methods(METHODS, FACTOR).values():
        loaded, tokenizer = load_unpatched(directory, device="cpu", dtype="float32")
        ids = tokenize(tokenizer, text)
        with patched(loaded.eval(), method) as model:
            for length in LENGTHS:
                for depth in DEPTHS:
                    for sample in range(SAMPLES):
                        inputs = tokenizer(question(tokenizer, length, depth, sample))
                        model.generate(
                            input_ids=torch.tensor([inputs["input_ids"]]),
                            attention_mask=torch.tensor([inputs["attention_mask"]]),
                            max_new_tokens=10,
                            do_sample=False,
                            pad_token_id=0,
                        )
                for end in torch.linspace(max(LENGTHS), len(ids), WINDOWS).long().tolist():
                    window = ids[None, end - length : end]
                    logits = model(input_ids=window).logits[0, :-1].float()
                    torch.log_softmax(logits, -1)[-TARGETS:].gather(-1, window[0, -TARGETS:, None])


def question(tokenizer: Any, length: int, depth: float, sample: int) -> str:
    """Return the longest prompt that leaves room for 10 tokens, by trying every size."""
    task, place = Passkey(), Place(length, depth, None, sample)
    size, prompt = 0, ""
    while True:
        draft = task.draft(random.Random(f"{length}/{depth}/{sample}"), size, place)
        longer = draft.prompt + draft.answer
        if len(tokenizer(longer, verbose=False)["input_ids"]) + 10 > length:
            return prompt
        size, prompt = size + 1, longer


def ours(model: str, text: Path) -> None:
    """Run `compare` in this process."""
    compare(build(model, text))


STOCK = """
import json, sys, logging
from lm_eval import simple_evaluate
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from datasets import Dataset
import datasets
directory, path = sys.argv[1:]
def test(name):
    rows = [json.loads(line) for line in open(f"{path}/{name}.jsonl")]
    return lambda **_: {"test": Dataset.from_list(rows)}
common = {"test_split": "test", "dataset_path": "", "num_fewshot": 0}
keys = {**common, "task": "keys", "custom_dataset": test("keys"), "output_type": "generate_until",
        "doc_to_text": "{{prompt}}", "doc_to_target": "{{gold}}",
        "generation_kwargs": {"until": [], "max_gen_toks": 10, "do_sample": False},
        "metric_list": [{"metric": "exact_match"}]}
windows = {**common, "task": "windows", "custom_dataset": test("windows"),
           "output_type": "loglikelihood", "doc_to_text": "{{context}}",
           "doc_to_target": "{{target}}", "target_delimiter": "",
           "metric_list": [{"metric": "perplexity"}]}
manager = TaskManager(include_defaults=False)
lm = HFLM(pretrained=directory, batch_size=1, device="cpu")
simple_evaluate(lm, tasks=[keys, windows], task_manager=manager, bootstrap_iters=0)
"""


def stock_inputs(comparison: Comparison, folder: Path) -> None:
    """Write the documents and a model per method for stock lm-eval."""
    tokenizer = comparison.tokenizer
    documents = build_dataset("rope_passkey", tokenizer, LENGTHS, SAMPLES)
    ids = tokenize(tokenizer, comparison.text)
    keys = [{"prompt": d["prompt"] + d["answer"], "gold": d["gold"][0]} for d in documents]
    ends = torch.linspace(max(LENGTHS), len(ids), WINDOWS).long().tolist()
    windows = [
        {
            "context": tokenizer.decode(ids[end - length : end - TARGETS]),
            "target": tokenizer.decode(ids[end - TARGETS : end]),
        }
        for length in LENGTHS
        for end in ends
    ]
    for name, data in (("keys", keys), ("windows", windows)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in data))
    for label, method in comparison.methods.items():
        with patched(comparison.model, method) as model:
            # room for the longest prompt, so that nothing is truncated
            model.config.max_position_embeddings = 2 * max(LENGTHS)
            model.save_pretrained(folder / label)
            tokenizer.save_pretrained(folder / label)


def stock(comparison: Comparison, folder: Path) -> None:
    """Run stock lm-eval, one process per method as its command line requires."""
    for label in comparison.methods:
        subprocess.run(
            [sys.executable, "-c", STOCK, str(folder / label), str(folder)],
            check=True,
            capture_output=True,
            env={**os.environ, "TQDM_DISABLE": "1"},
        )


def seconds(call: Any) -> float:
    """Return the CPU time of a call, including subprocesses."""
    before = _cpu()
    call()
    return _cpu() - before


def _cpu() -> float:
    who = (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)
    return sum(sum(resource.getrusage(process)[:2]) for process in who)


def prompts(comparison: Comparison) -> None:
    """Run the part of the plain loop that builds questions."""
    for _ in comparison.methods:
        for length in LENGTHS:
            for depth in DEPTHS:
                for sample in range(SAMPLES):
                    question(comparison.tokenizer, length, depth, sample)


def widen(model: str, vocabulary: int, folder: Path) -> str:
    """Save the model with a larger vocabulary, and return the path."""
    loaded, tokenizer = load_unpatched(model, device="cpu", dtype="float32")
    torch.manual_seed(0)
    loaded.resize_token_embeddings(vocabulary, mean_resizing=False)
    loaded.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def times(model: str, text: Path, with_stock: bool, blocks: int) -> dict[str, Any]:
    """Return median CPU times of the ways, and medians of their ratios per round."""
    comparison = build(model, text)
    data = rows(comparison)
    took: dict[str, list[float]] = {"bare forwards": [], "hf-rope": [], "plain loop": []}
    ours(model, text)
    building = seconds(lambda: prompts(comparison))
    with tempfile.TemporaryDirectory() as name:
        if with_stock:
            took["stock lm-eval"] = []
            stock_inputs(comparison, Path(name))
        for _ in range(blocks):
            took["bare forwards"].append(seconds(lambda: bare(comparison, data)))
            took["hf-rope"].append(seconds(lambda: ours(model, text)))
            took["plain loop"].append(seconds(lambda: plain_loop(model, comparison.text)))
            if with_stock:
                took["stock lm-eval"].append(seconds(lambda: stock(comparison, Path(name))))

    def ratio(way: str, other: str) -> float:
        pairs = zip(took[way], took[other], strict=True)
        return statistics.median(a / b for a, b in pairs)

    results: dict[str, Any] = {
        "cpu seconds": {way: statistics.median(times) for way, times in took.items()},
        "hf-rope over bare forwards": ratio("hf-rope", "bare forwards"),
        "plain loop over hf-rope": ratio("plain loop", "hf-rope"),
        "plain loop over hf-rope, its prompts given": ratio("plain loop", "hf-rope")
        - building / statistics.median(took["hf-rope"]),
    }
    if with_stock:
        results["stock lm-eval over hf-rope"] = ratio("stock lm-eval", "hf-rope")
    return results


MEMORY = """
import resource, sys, torch
from transformers import LlamaConfig, LlamaForCausalLM
from hf_rope_ext.evals.bench import Bench
from hf_rope_ext.evals.perplexity import Perplexity
way, length, vocabulary = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
model = LlamaForCausalLM(LlamaConfig(vocab_size=vocabulary, hidden_size=64, intermediate_size=64,
    num_hidden_layers=2, num_attention_heads=4, max_position_embeddings=length)).eval()
ids = torch.randint(0, vocabulary, (length,))
model(input_ids=ids[None, :64], logits_to_keep=1)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
if way == "full":
    with torch.inference_mode():
        logits = model(input_ids=ids[None], use_cache=False).logits[0, :-1].float()
        torch.log_softmax(logits, -1).gather(-1, ids[1:, None]).sum()
else:
    bench = Bench(None, ids, length)
    Perplexity(mode="disjoint").measure(bench, model, length, 1, lambda done: None)
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024)
"""


def memory() -> dict[str, Any]:
    """Return the additional peak memory of scoring a whole window, in MiB."""
    results: dict[str, Any] = {}
    for length in MEMORY_LENGTHS:
        added = {}
        for way in ("full", "ours"):
            words = [sys.executable, "-c", MEMORY, way, str(length), str(VOCABULARY)]
            done = subprocess.run(words, capture_output=True, text=True, check=True)
            added[way] = float(done.stdout)
        results[str(length)] = {
            "full logits MiB": added["full"],
            "hf-rope MiB": added["ours"],
            "share": added["ours"] / added["full"],
            "logits alone MiB": length * VOCABULARY * 4 / 2**20,
        }
    return results


def main() -> None:
    """Run the benchmark and record the results."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", nargs="?", default=str(DIRECTORY))
    parser.add_argument("text", nargs="?", type=Path, default=TEXT)
    parser.add_argument("--name", default="evaluation", help="name of the result file")
    parser.add_argument("--without-stock", action="store_true", help="skip stock lm-eval")
    parser.add_argument("--only", choices=("time", "memory"))
    parser.add_argument("--vocabulary", type=int, help="pad the vocabulary to this size")
    parser.add_argument("--blocks", type=int, default=3, help="rounds of alternating ways")
    options = parser.parse_args()
    torch.set_num_threads(1)
    results: dict[str, Any] = {}
    if options.only != "memory":
        with tempfile.TemporaryDirectory() as name:
            model = options.model
            if options.vocabulary:
                model = widen(model, options.vocabulary, Path(name))
            results["time"] = times(model, options.text, not options.without_stock, options.blocks)
    if options.only != "time":
        results["memory"] = memory()
    assert all(
        math.isfinite(value) for value in results.get("time", {}).get("cpu seconds", {}).values()
    )
    settings: dict[str, Any] = {"methods": METHODS, "lengths": LENGTHS, "depths": DEPTHS}
    settings |= {"samples": SAMPLES, "windows": WINDOWS, "targets": TARGETS}
    if options.only != "memory":
        settings |= {
            "blocks": options.blocks,
            "vocabulary": options.vocabulary or "the model's",
        }
    path = record(options.name, results, **settings)
    print(path, json.dumps(results, indent=2))


if __name__ == "__main__":
    main()
