"""Perplexity of each method before and after LoRA, on third-party weights and text.

Every method is patched in at 4x, measured, tuned on sequences of four times the trained length and
measured again, for several seeds. Run it as ``python benchmarks/finetune_stories.py DIRECTORY``,
where the directory holds ``stories260k/`` (karpathy's stories260K in Hugging Face form) and
``tinystories.txt``; with ``--keep FOLDER`` it resumes where it stopped.
"""

import argparse
import json
import math
import statistics
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from recording import record
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainingArguments

from hf_rope_ext import patched
from hf_rope_ext.evals.bench import Bench
from hf_rope_ext.evals.perplexity import Perplexity
from hf_rope_ext.finetune import Recipe, finetune
from hf_rope_ext.finetune.documents import Source, load_documents, split_stream
from hf_rope_ext.parsing import parse_methods

TRAINED, FACTOR = 512, 4
LENGTHS = tuple(TRAINED * times for times in (1, 2, 4, 8))
WINDOWS, TARGETS = 14, 256
METHODS = ("none", "linear", "ntk", "yarn")
HELD_OUT = 0.15
SETTINGS: dict[str, Any] = {
    "max_steps": 80,
    "learning_rate": 5e-3,
    "lr_scheduler_type": "cosine",
    "warmup_steps": 5,
    "per_device_train_batch_size": 1,
}
LORA: dict[str, Any] = {"lora_rank": 8, "lora_alpha": 16.0, "lora_targets": ["all-linear"]}


def read_stories(text: Path) -> Dataset:
    """Return a dataset with one row for each story of a file."""
    stories = text.read_text(encoding="utf-8").split("<|endoftext|>")
    return Dataset.from_dict({"text": [story.strip() for story in stories if story.strip()]})


def measure_perplexities(model: Any, ids: torch.Tensor) -> dict[str, float]:
    """Return the perplexity of the same tokens at each length."""
    bench = Bench(None, ids, max(LENGTHS), windows=WINDOWS, targets=TARGETS)
    measure = partial(Perplexity().measure, bench, model)
    model.eval()
    with torch.inference_mode():
        return {
            str(length): measure(length, max(8192 // length, 1), lambda done: None)["perplexity"]
            for length in LENGTHS
        }


def tune(directory: Path, method: str, seed: int) -> dict[str, Any]:
    """Return the perplexities before and after tuning one method with one seed."""
    tokenizer = AutoTokenizer.from_pretrained(directory / "stories260k")
    model = AutoModelForCausalLM.from_pretrained(directory / "stories260k")
    data = read_stories(directory / "tinystories.txt")
    rows = load_documents(Source(data), tokenizer)
    ids = split_stream(rows, HELD_OUT, max(LENGTHS))[1].tokens()
    with tempfile.TemporaryDirectory() as output:
        training = TrainingArguments(
            output_dir=output,
            seed=seed,
            report_to="none",
            save_strategy="no",
            logging_steps=1,
            use_cpu=True,
            dataloader_pin_memory=False,
            disable_tqdm=True,
            **SETTINGS,
        )
        recipe = Recipe(
            method=method,
            factor=None if method == "none" else FACTOR,
            sequence_length=FACTOR * TRAINED,
            held_out=HELD_OUT,
            eval_lengths="512",
            eval_windows=1,
            eval_passkeys=0,
            **LORA,
        )
        done = finetune(recipe, training, model=model, tokenizer=tokenizer, data=data)
    losses = [entry["loss"] for entry in done.history if "loss" in entry]
    return {"perplexity": measure_perplexities(done.model, ids), "last losses": losses[-5:]}


def measure_untuned(directory: Path) -> dict[str, dict[str, float]]:
    """Return the perplexities of every method before tuning."""
    tokenizer = AutoTokenizer.from_pretrained(directory / "stories260k")
    model = AutoModelForCausalLM.from_pretrained(directory / "stories260k")
    rows = load_documents(Source(read_stories(directory / "tinystories.txt")), tokenizer)
    ids = split_stream(rows, HELD_OUT, max(LENGTHS))[1].tokens()
    results_by_method = {}
    for name, method in parse_methods(",".join(METHODS), FACTOR).items():
        with patched(model, method):
            results_by_method[name] = measure_perplexities(model, ids)
    return results_by_method


def summarize(cells: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Return mean and standard deviation over seeds, by method and length."""
    results_by_method: dict[str, Any] = {}
    for method in METHODS:
        runs = [cell["perplexity"] for key, cell in cells.items() if key.startswith(f"{method} ")]
        results_by_method[method] = {
            length: {
                "mean": statistics.fmean(run[length] for run in runs),
                "stdev": statistics.stdev(run[length] for run in runs) if len(runs) > 1 else 0.0,
            }
            for length in map(str, LENGTHS)
        }
    return results_by_method


def main() -> None:
    """Run what has not been run yet, and write the result."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("directory", type=Path)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--keep", type=Path, default=Path(tempfile.mkdtemp()))
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    wanted: dict[str, Callable[[], Any]] = {"untuned": lambda: measure_untuned(arguments.directory)}
    for seed in range(arguments.seeds):
        for method in METHODS:
            wanted[f"{method} {seed}"] = partial(tune, arguments.directory, method, seed)
    arguments.keep.mkdir(exist_ok=True)
    for key, measure in wanted.items():
        path = arguments.keep / f"{key}.json"
        if not path.is_file():
            path.write_text(json.dumps(measure()))
            print(key, path.read_text(), flush=True)
    cells = {key: json.loads((arguments.keep / f"{key}.json").read_text()) for key in wanted}
    before = cells.pop("untuned")
    after = summarize(cells)
    base = before["none"][str(TRAINED)]
    reached = {name: row[str(FACTOR * TRAINED)]["mean"] / base for name, row in after.items()}
    results = {
        "untuned": before,
        "tuned": after,
        "tuned at 4x over none untuned at 1x": reached,
        "runs": cells,
    }
    assert all(math.isfinite(value) for value in reached.values())
    path = record(
        "finetune_stories",
        results,
        training=SETTINGS,
        lora=LORA,
        sequence_length=FACTOR * TRAINED,
        windows=WINDOWS,
        targets=TARGETS,
        held_out=HELD_OUT,
        seeds=arguments.seeds,
    )
    print(path)


if __name__ == "__main__":
    main()
