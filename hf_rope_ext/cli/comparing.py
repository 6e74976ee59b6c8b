"""Commands that measure patched models: compare and eval."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from hf_rope_ext.cli.options import (
    AsJson,
    Factor,
    Methods,
    Model,
    Original,
    console,
    model_or_bundled,
    patch_words,
    print_json,
    print_line,
    read_model_config,
    require_device,
)
from hf_rope_ext.errors import AlreadyScaledError
from hf_rope_ext.parsing import parse_lengths, parse_methods, split_tasks

Text = Annotated[Path | None, typer.Option(help="A long UTF-8 text.")]
Output = Annotated[Path, typer.Option(help="Directory for the report and its plots.")]
Lengths = Annotated[str, typer.Option(help="Lengths in tokens, or multiples of the trained one.")]
Tasks = Annotated[
    str,
    typer.Option(
        help="Comma-separated task names; options follow after colons: rope_ppl:stride=64. "
        "--tasks list shows them."
    ),
]
Samples = Annotated[
    int, typer.Option(min=1, help="Questions per length, and per depth in tasks with depths.")
]
Minutes = Annotated[
    float | None, typer.Option(help="Stop after this time and report the cells finished by then.")
]


def compare(
    model: Model = None,
    methods: Methods = "none,linear,ntk,dynamic,yarn",
    factor: Factor = 4.0,
    lengths: Lengths = "1x,2x,4x,8x",
    text: Text = None,
    output: Output = Path("rope_report"),
    tasks: Tasks = "perplexity,passkey",
    samples: Samples = 50,
    windows: Annotated[int, typer.Option(min=1, help="Windows to measure perplexity in.")] = 32,
    targets: Annotated[int, typer.Option(min=1, help="Tokens scored in each window.")] = 64,
    seed: Annotated[int, typer.Option(help="Seed for the questions.")] = 0,
    max_minutes: Minutes = None,
    device: Annotated[str, typer.Option(help="Device to run the model on.")] = "cpu",
    dtype: Annotated[str, typer.Option(help="float32, bfloat16 or float16.")] = "float32",
    replace: Annotated[
        bool, typer.Option(help="Replace the scaling in the model's config, or its saved patch.")
    ] = False,
    original: Original = None,
    as_json: AsJson = False,
) -> None:
    """Compare methods on tasks at several lengths; by default, perplexity and pass keys.

    An interrupted comparison resumes when the same command is run again.
    """
    from hf_rope_ext.assets import TEXT
    from hf_rope_ext.evals.compare import Comparison
    from hf_rope_ext.evals.compare import compare as run
    from hf_rope_ext.evals.fingerprint import trained_length
    from hf_rope_ext.evals.registry import describe_tasks, needs_processor
    from hf_rope_ext.evals.text import read_text
    from hf_rope_ext.evals.writing import save_report
    from hf_rope_ext.saving.loading import load_processor, load_unpatched

    if tasks == "list":
        for name, description in describe_tasks().items():
            print(f"{name:28}{description}")
        return
    chosen = parse_methods(methods, factor)
    chosen_tasks = split_tasks(tasks)
    source = model_or_bundled(model)
    words = "" if model and not text else read_text(text or TEXT)
    require_device(device)
    _, record = read_model_config(model)
    if record is not None and not replace:
        raise AlreadyScaledError(
            f"{source!r} was saved with a patch ({patch_words(record)}), and methods are compared "
            f"without it: pass --replace to compare them in its place."
        )
    loaded, tokenizer = load_unpatched(source, device=device, dtype=dtype)
    trained = original or trained_length(loaded)
    processor = None
    if needs_processor(chosen_tasks):
        processor = load_processor(source)
    comparison = Comparison(
        model=loaded,
        tokenizer=tokenizer,
        text=words,
        methods=chosen,
        lengths=parse_lengths(lengths, trained),
        tasks=chosen_tasks,
        windows=windows,
        targets=targets,
        samples=samples,
        seed=seed,
        name=Path(model).name if model else "bundled",
        replace=replace,
        processor=processor,
        original_max_position_embeddings=original,
    )
    with _progress() as show:
        report = run(comparison, output, show, max_minutes)
    files = save_report(report, output)
    if as_json:
        print_json({"settings": report.settings, "cells": report.cells})
        return
    _print_report(report, files, max_minutes)


def evaluate(context: typer.Context) -> None:
    """Run lm-eval on a patched model; takes lm-eval's own arguments."""
    from hf_rope_ext.evals.lm_eval.command import launch

    launch(context.args)


@contextmanager
def _progress() -> Iterator[Any]:
    """Return a function that shows a cell and how many are done in a progress bar on stderr."""
    from rich.progress import (
        BarColumn,
        Progress,
        TaskProgressColumn,
        TextColumn,
        TimeRemainingColumn,
    )

    columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn())
    progress = Progress(*columns, TimeRemainingColumn(), console=Console(stderr=True))
    bar = progress.add_task("", total=None)

    def show(cell: Any, done: int, total: int) -> None:
        progress.start()  # not before there is something to show
        description = f"{cell.method} {cell.task} at {cell.length}"
        progress.update(bar, description=description, completed=done, total=total)

    try:
        yield show
    finally:
        if progress.live.is_started:
            progress.stop()


def _print_report(report: Any, files: list[Path], max_minutes: float | None) -> None:
    from hf_rope_ext.evals.writing import make_table

    for task in report.tasks:
        console.print(make_table(report, task))
    if report.missing:
        total = len(report.missing) + len(report.cells)
        print_line(
            f"stopped after {max_minutes:g} minutes with {len(report.cells)} of {total} cells; the "
            f"same command goes on from there."
        )
    print_line("wrote " + ", ".join(map(str, files)))
