"""The ``hf-rope`` command: it parses, calls and prints."""

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from hf_rope_ext.errors import RopeError
from hf_rope_ext.parsing import parse_lengths, parse_methods, parse_size, split_tasks

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Extend the context of RoPE models, and see what it does.",
)
out = Console()

Model = Annotated[
    str | None, typer.Argument(help="Directory or hub id of a model; the bundled one if not given.")
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")]
Original = Annotated[
    int | None,
    typer.Option("--original", help="Trained length in positions, where the config's is not it."),
]
Methods = Annotated[
    str,
    typer.Option(
        "--methods",
        "--method",
        help="Names with commas between; knobs follow with colons: yarn:beta_fast=16.",
    ),
]


@app.command()
def inspect(
    model: Model = None,
    pairs: Annotated[bool, typer.Option(help="Also list every pair.")] = False,
    as_json: AsJson = False,
) -> None:
    """Show a model's RoPE: geometry, pairs, wavelengths, and the scaling it comes with."""
    from hf_rope_ext.planning.extension import inspect_config

    found = inspect_config(_config(model))
    if as_json:
        _print_json([one.to_dict() for one in found])
        return
    for one in found:
        trained = one.original_max_position_embeddings
        table = Table(
            title=f"{one.model_type}: {one.path}", title_justify="left", show_header=False
        )
        turning = [length for length in one.wavelengths if length is not None]
        rows = {
            "layer type": one.layer_type,
            "rope_theta": f"{one.rope_theta:g}",
            "rotated / head": f"{one.rotary_dim} / {one.head_dim or '?'} coordinates",
            "trained length": f"{trained or 'not in the config'}",
            "scaling": one.scaling.get("rope_type"),
            "fastest pair": f"one turn in {turning[0]:.4g} positions",
            "slowest pair": f"one turn in {turning[-1]:.6g} positions",
            "never finish a turn": f"{one.unfinished_pairs} of {len(one.wavelengths)} pairs",
            "sliding window": one.window,
        }
        for name, value in rows.items():
            if value is not None:
                table.add_row(name, str(value))
        out.print(table)
        if pairs:
            out.print(_pair_table(one))


@app.command()
def plan(
    model: Model = None,
    target: Annotated[str | None, typer.Option(help="Target length: 131072, 128k, or 4x.")] = None,
    image: Annotated[
        list[str] | None,
        typer.Option(
            help="Instead of a target, a request: an image of 1280x720 pixels, or a grid of "
            "1x46x80 patches. Again for another."
        ),
    ] = None,
    images: Annotated[int, typer.Option(min=1, help="How many of each --image.")] = 1,
    video: Annotated[
        list[str] | None, typer.Option(help="A video of the request, in the same way.")
    ] = None,
    frames: Annotated[
        int | None, typer.Option(min=1, help="Frames sampled of each --video in pixels.")
    ] = None,
    fps: Annotated[float, typer.Option(help="Frames sampled per second.")] = 2.0,
    text: Annotated[int, typer.Option(min=0, help="Tokens of its text, the answer included.")] = 0,
    methods: Methods = "none,linear,ntk,ntk_by_parts,yarn,llama3,dynamic_yarn",
    original: Original = None,
    number_bytes: Annotated[int, typer.Option(min=1, help="Size of a number in the cache.")] = 2,
    as_json: AsJson = False,
) -> None:
    """Show what reaching a length takes: factor, methods, memory, words for other engines.

    The length is a target, or that of a request with images and videos in positions.
    """
    from hf_rope_ext.planning.extension import plan_extension, text_site
    from hf_rope_ext.planning.visual_length import Video, visual_length

    asked = bool(image or video or text)
    if asked == (target is not None):
        raise RopeError("give either --target, or a request: --image, --video and --text.")
    config = _config(model)
    site = text_site(config, original)
    trained = site.geometry.original_max_position_embeddings
    request = None
    if target is None:
        request = visual_length(
            model or _bundled(),
            images=[parse_size(one) for one in image or () for _ in range(images)],
            videos=[Video(parse_size(one), frames, fps) for one in video or ()],
            text=text,
        )
        request = replace(request, trained=trained)
        length = request.positions
    else:
        (length,) = parse_lengths(target, trained)
    if request is not None and not as_json:
        _print_request(request)
    if request is not None and request.factor == 1.0:
        if as_json:
            _print_json({"request": request.to_dict()})
        else:
            out.print("Within the trained length: nothing needs to be changed.")
        return
    chosen = parse_methods(methods, max(length / trained, 1.0))
    tokens = None if request is None else request.tokens
    found = plan_extension(config, site, length, chosen, number_bytes, tokens)
    if as_json:
        _print_json(asdict(found) | ({} if request is None else {"request": request.to_dict()}))
        return
    _print_plan(found, site.geometry.pairs)


def _print_request(request: Any) -> None:
    out.print(str(request), highlight=False, soft_wrap=True)
    for words in request.assumed:
        out.print(f"assumed: {words}", markup=False, highlight=False, soft_wrap=True)
    if len(set(request.factors.values())) > 1:
        out.print(f"by axis: factor={json.dumps(request.factors)}", highlight=False)


def _print_plan(found: Any, pairs: int) -> None:
    out.print(
        f"{found.trained_length} -> {found.target_length} positions: factor {found.factor:g}. "
        f"Keys and values of one sequence: {found.cache_bytes / 2**30:.3g} GiB.",
        highlight=False,
        soft_wrap=True,
    )
    table = Table(title=f"{pairs} pairs", title_justify="left")
    table.add_column("method", no_wrap=True)
    for heading in ("kept", "between", "slowed in full", "unseen angles", "cos, sin", "nearest"):
        table.add_column(heading, justify="right")
    for label, one in found.effects.items():
        counts = (one.kept, one.between, one.slowed_in_full, one.unseen)
        scales = (f"x {one.attention_scaling:.4g}", f"/ {one.nearest:.4g}")
        table.add_row(label, *map(str, counts), *scales)
    out.print(table)
    for words in found.advice:
        out.print(f"note: {words}", markup=False, highlight=False, soft_wrap=True)
    out.print("yarn for other engines:", highlight=False)
    for engine, line in found.exports.items():
        out.print(f"  {engine}: {line}", markup=False, highlight=False, soft_wrap=True)


@app.command("export")
def export_command(
    model: Model = None,
    to: Annotated[str, typer.Option(help="transformers, vllm, sglang or llama.cpp.")] = (
        "transformers"
    ),
    method: Annotated[
        str | None,
        typer.Option(help="As in compare; the recorded one of a saved patch if not given."),
    ] = None,
    factor: Annotated[float | None, typer.Option(help="Target over trained length.")] = None,
    target: Annotated[str | None, typer.Option(help="Target length instead of factor.")] = None,
    original: Original = None,
    frozen: Annotated[
        int | None, typer.Option(help="Export the plan a request of this length gets.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Print what makes another engine compute a method on a model."""
    from hf_rope_ext.planning.extension import text_site
    from hf_rope_ext.saving.engines import export
    from hf_rope_ext.saving.loading import read_config
    from hf_rope_ext.saving.record import recorded_method

    config, record = read_config(model or _bundled())
    if record is not None and "vision" in (record.get("target"), *record):
        raise RopeError(
            f"{model!r} was saved with a patched vision tower, for which {to} has no words; "
            f"unpatch it and save the model again."
        )
    arguments: dict[str, Any] = {"original_max_position_embeddings": original, "replace": True}
    if method is None:
        if record is None:
            raise RopeError("give --method; the model has no recorded patch.")
        chosen = recorded_method(record)
        arguments["original_max_position_embeddings"] = record["original_max_position_embeddings"]
    else:
        if target is not None:
            trained = text_site(config, original).geometry.original_max_position_embeddings
            factor = parse_lengths(target, trained)[0] / trained
        (chosen,) = parse_methods(method, factor).values()
    found = export(config, to, method=chosen, frozen=frozen, **arguments)
    if as_json:
        _print_json(asdict(found))
        return
    print(found.command_line or json.dumps(found.config, indent=2))
    for note in found.notes:
        print(f"note: {note}", file=sys.stderr)


@app.command()
def compare(
    model: Model = None,
    methods: Methods = "none,linear,ntk,dynamic,yarn",
    factor: Annotated[float, typer.Option(help="Of each method that takes one.")] = 4.0,
    lengths: Annotated[str, typer.Option(help="In tokens, or times the trained length.")] = (
        "1x,2x,4x,8x"
    ),
    text: Annotated[Path | None, typer.Option(help="A long UTF-8 text.")] = None,
    output: Annotated[Path, typer.Option(help="Where report and plots go.")] = Path("rope_report"),
    tasks: Annotated[
        str,
        typer.Option(
            help="Names with commas between; options follow with colons: rope_ppl:stride=64. "
            "--tasks list shows them."
        ),
    ] = "perplexity,passkey",
    samples: Annotated[
        int, typer.Option(min=1, help="Questions per length, and per depth where a task has them.")
    ] = 50,
    windows: Annotated[int, typer.Option(min=1, help="Places perplexity is measured at.")] = 32,
    targets: Annotated[int, typer.Option(min=1, help="Tokens scored at each place.")] = 64,
    seed: Annotated[int, typer.Option(help="Of the questions.")] = 0,
    max_minutes: Annotated[
        float | None, typer.Option(help="Stop after this time, with the cells finished by then.")
    ] = None,
    device: Annotated[str, typer.Option(help="Where the model runs.")] = "cpu",
    dtype: Annotated[str, typer.Option(help="float32, bfloat16 or float16.")] = "float32",
    replace: Annotated[
        bool, typer.Option(help="Replace the scaling in the model's own config.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Measure methods on tasks at several lengths: perplexity and pass keys unless told.

    Interrupted, it goes on where it stopped when it is called again.
    """
    from rich.progress import (
        BarColumn,
        Progress,
        TaskProgressColumn,
        TextColumn,
        TimeRemainingColumn,
    )

    from hf_rope_ext.assets import TEXT
    from hf_rope_ext.evals.compare import Comparison
    from hf_rope_ext.evals.compare import compare as run
    from hf_rope_ext.evals.journal import Cell
    from hf_rope_ext.evals.registry import describe_tasks, needs_processor
    from hf_rope_ext.evals.text import read_text
    from hf_rope_ext.evals.writing import make_table, save_report
    from hf_rope_ext.planning.extension import text_site
    from hf_rope_ext.saving.loading import load_processor, load_unpatched

    if tasks == "list":
        for name, what in describe_tasks().items():
            print(f"{name:28}{what}")
        return
    chosen = parse_methods(methods, factor)
    chosen_tasks = split_tasks(tasks)
    words = "" if model and not text else read_text(text or TEXT)
    loaded, tokenizer = load_unpatched(model or _bundled(), device=device, dtype=dtype)
    trained = text_site(loaded.config).geometry.original_max_position_embeddings
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
        processor=load_processor(model or _bundled()) if needs_processor(chosen_tasks) else None,
    )
    columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn())
    progress = Progress(*columns, TimeRemainingColumn(), console=Console(stderr=True))
    bar = progress.add_task("", total=None)

    def show(cell: Cell, done: int, total: int) -> None:
        progress.start()  # not before there is something to show
        words = f"{cell.method} {cell.task} at {cell.length}"
        progress.update(bar, description=words, completed=done, total=total)

    try:
        report = run(comparison, output, show, max_minutes)
    finally:
        if progress.live.is_started:
            progress.stop()
    files = save_report(report, output)
    if as_json:
        _print_json({"settings": report.settings, "cells": report.cells})
        return
    for task in report.tasks:
        out.print(make_table(report, task))
    if report.missing:
        every = len(report.missing) + len(report.cells)
        out.print(
            f"stopped after {max_minutes:g} minutes with {len(report.cells)} of {every} cells; the "
            f"same command goes on from there.",
            highlight=False,
        )
    out.print("wrote " + ", ".join(map(str, files)), highlight=False, soft_wrap=True)


@app.command(
    "eval",
    add_help_option=False,
    context_settings={"allow_extra_args": True, "ignore_unknown_options": True},
)
def eval_command(context: typer.Context) -> None:
    """Run lm-eval on a patched model; takes lm-eval's own arguments."""
    from hf_rope_ext.evals.lm_eval.command import launch

    launch(context.args)


@app.command()
def plot(
    output: Annotated[Path, typer.Option(help="The PNG to write.")],
    model: Model = None,
    methods: Methods = "none,linear,ntk,yarn",
    factor: Annotated[float, typer.Option(help="Of each method that takes one.")] = 4.0,
    original: Original = None,
    as_json: AsJson = False,
) -> None:
    """Draw what methods do to a model's pairs, and how attention decays over distance."""
    from hf_rope_ext.planning.extension import curves, text_site

    geometry = text_site(_config(model), original).geometry
    found = curves(geometry, parse_methods(methods, factor), factor)
    if as_json:
        _print_json(found)
    _plots().plot_curves(found, output)
    if not as_json:
        out.print(f"wrote {output}", highlight=False, soft_wrap=True)


@app.command(
    "finetune",
    context_settings={"allow_extra_args": True, "ignore_unknown_options": True},
)
def finetune_command(
    context: typer.Context,
    fields: Annotated[bool, typer.Option("--fields", help="List a recipe's fields.")] = False,
    as_json: AsJson = False,
) -> None:
    """Fine-tune a model for a longer context: [RECIPE.yaml] [--field value]...

    A recipe's fields are those that --fields lists and those of transformers' TrainingArguments;
    a flag wins over the file. Without a model the bundled one is tuned. Started again with
    --resume, an interrupted run goes on where it stopped.
    """
    from hf_rope_ext.assets import TEXT

    with _extra("finetune"):
        from hf_rope_ext.finetune.recipe import describe_flags, parse
        from hf_rope_ext.finetune.run import finetune

    if fields:
        table = Table("field", "default", "what it says")
        for row in describe_flags():
            table.add_row(*row)
        out.print(table)
        return
    words = context.args
    config = Path(words[0]) if words and not words[0].startswith("-") else None
    recipe, training = parse(words[config is not None :], config)
    if not recipe.model:
        recipe = replace(recipe, model=_bundled(), data=recipe.data or str(TEXT))
    done = finetune(recipe, training)
    if not training.should_save:
        return
    if as_json:
        _print_json({"directory": str(done.directory), "before": done.before, "after": done.after})
        return
    table = Table("measured", "before", "after", title_justify="left")
    for name, value in done.after.items():
        before = done.before.get(name)
        table.add_row(name, "" if before is None else f"{before:.4g}", f"{value:.4g}")
    out.print(table)
    out.print(f"wrote {done.directory}", highlight=False, soft_wrap=True)


@app.command()
def merge(
    adapter: Annotated[Path, typer.Argument(help="Directory of a fine-tuned adapter.")],
    output: Annotated[Path, typer.Argument(help="Directory to write the merged model to.")],
    frozen: Annotated[
        int | None, typer.Option(help="Give the model the plan of one length, in positions.")
    ] = None,
) -> None:
    """Write a base model with its adapter merged and its RoPE in the plain config."""
    with _extra("finetune"):
        from hf_rope_ext.finetune.merge import merge_adapter

    merge_adapter(adapter, output, frozen=frozen)
    out.print(f"wrote {output}", highlight=False, soft_wrap=True)


def main() -> None:
    """Run the command; an error is one line on stderr and exit status 2."""
    try:
        app()
    except RopeError as error:
        print(f"hf-rope: error: {error}", file=sys.stderr)
        sys.exit(2)


def _config(model: str | None) -> Any:
    from hf_rope_ext.saving.loading import read_config

    return read_config(model or _bundled())[0]


def _bundled() -> str:
    from hf_rope_ext.assets import DIRECTORY

    return str(DIRECTORY)


@contextmanager
def _extra(name: str) -> Iterator[None]:
    try:
        yield
    except ImportError as error:
        raise RopeError(f"{error}: pip install 'hf-rope-ext[{name}]'") from error


def _plots() -> Any:
    try:
        from hf_rope_ext.evals import plots
    except ImportError as error:
        raise RopeError("plots need matplotlib: pip install 'hf-rope-ext[plot]'") from error
    return plots


def _pair_table(one: Any) -> Table:
    table = Table("pair", "positions per turn", "turns in training")
    for index, (length, turns) in enumerate(zip(one.wavelengths, one.turns, strict=True)):
        table.add_row(str(index), "rests" if length is None else f"{length:.6g}", f"{turns:.4g}")
    return table


def _print_json(value: Any) -> None:
    print(json.dumps(value, indent=2))


if __name__ == "__main__":
    main()
