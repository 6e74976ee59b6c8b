"""Commands that read only a model's config: inspect, plan, export and plot."""

import json
import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

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
    require_extra,
    writing,
)
from hf_rope_ext.errors import RopeError
from hf_rope_ext.parsing import parse_lengths, parse_methods, parse_size

Images = Annotated[
    list[str] | None,
    typer.Option(
        help="Plan for a request instead of a target: an image of 1280x720 pixels, or a grid of "
        "1x46x80 patches. Repeatable.",
    ),
]
Videos = Annotated[
    list[str] | None,
    typer.Option(help="A video in the request, sized like --image. Repeatable."),
]


def inspect(
    model: Model = None,
    pairs: Annotated[bool, typer.Option(help="Also list every pair.")] = False,
    as_json: AsJson = False,
) -> None:
    """Show a model's RoPE: geometry, pairs, wavelengths and built-in scaling."""
    from hf_rope_ext.planning.extension import inspect_config

    inspections = inspect_config(*read_model_config(model))
    if as_json:
        print_json([inspection.to_dict() for inspection in inspections])
        return
    for inspection in inspections:
        console.print(_inspection_table(inspection))
        if pairs:
            console.print(_pair_table(inspection))


def plan(
    model: Model = None,
    target: Annotated[str | None, typer.Option(help="Target length: 131072, 128k or 4x.")] = None,
    image: Images = None,
    images: Annotated[int, typer.Option(min=1, help="Copies of each --image.")] = 1,
    video: Videos = None,
    frames: Annotated[
        int | None, typer.Option(min=1, help="Frames sampled from each --video in pixels.")
    ] = None,
    fps: Annotated[float, typer.Option(help="Frames sampled per second.")] = 2.0,
    text: Annotated[
        int, typer.Option(min=0, help="Text tokens in the request, including the answer.")
    ] = 0,
    methods: Methods = "none,linear,ntk,ntk_by_parts,yarn,llama3,dynamic_yarn",
    original: Original = None,
    number_bytes: Annotated[int, typer.Option(min=1, help="Bytes per number in the KV cache.")] = 2,
    as_json: AsJson = False,
) -> None:
    """Show what a longer context takes: factor, methods, memory, flags for other engines.

    The length is either a target, or that of a request with images and videos, in positions.
    """
    from hf_rope_ext.planning.extension import plan_extension, text_site
    from hf_rope_ext.planning.visual_length import Video, visual_length

    has_request = bool(image or video or text)
    if has_request == (target is not None):
        raise RopeError("give either --target, or a request: --image, --video and --text.")
    config, _ = read_model_config(model)
    site = text_site(config, original)
    trained = site.geometry.original_max_position_embeddings
    request = None
    if target is None:
        request = visual_length(
            model_or_bundled(model),
            images=[parse_size(size) for size in image or () for _ in range(images)],
            videos=[Video(parse_size(size), frames, fps) for size in video or ()],
            text=text,
        )
        request = replace(request, trained=trained)
        if not as_json:
            _print_request(request)
        if request.factor == 1.0:
            if as_json:
                print_json({"request": request.to_dict()})
            return
        length = request.positions
    else:
        (length,) = parse_lengths(target, trained)
    chosen = parse_methods(methods, max(length / trained, 1.0))
    tokens = None if request is None else request.tokens
    extension = plan_extension(config, site, length, chosen, number_bytes, tokens)
    if as_json:
        print_json(asdict(extension) | ({"request": request.to_dict()} if request else {}))
        return
    _print_extension(extension, site.geometry.pairs)


def export(
    model: Model = None,
    to: Annotated[str, typer.Option(help="transformers, vllm, sglang or llama.cpp.")] = (
        "transformers"
    ),
    method: Annotated[
        str | None,
        typer.Option(help="Method, as in compare; defaults to the one recorded in a saved patch."),
    ] = None,
    factor: Annotated[float | None, typer.Option(help="Target length over trained length.")] = None,
    target: Annotated[str | None, typer.Option(help="Target length, instead of --factor.")] = None,
    original: Original = None,
    frozen: Annotated[
        int | None, typer.Option(help="Export the plan for a request of this length.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Print the settings that make another engine compute a method on a model."""
    from hf_rope_ext.planning.extension import text_site
    from hf_rope_ext.saving.engines import export as export_method
    from hf_rope_ext.saving.record import recorded_method

    config, record = read_model_config(model)
    if record is not None and "vision" in (record.get("target"), *record):
        raise RopeError(
            f"{model!r} was saved with a patched vision tower, which {to} cannot express; unpatch "
            f"the model and save it again."
        )
    if method is None:
        if record is None:
            raise RopeError("the model has no recorded patch; give --method.")
        chosen = recorded_method(record)
        original = record["original_max_position_embeddings"]
    else:
        if target is not None:
            trained = text_site(config, original).geometry.original_max_position_embeddings
            factor = parse_lengths(target, trained)[0] / trained
        (chosen,) = parse_methods(method, factor).values()
    exported = export_method(
        config,
        to,
        method=chosen,
        frozen=frozen,
        original_max_position_embeddings=original,
        replace=True,
    )
    if as_json:
        print_json(asdict(exported))
        return
    print(exported.command_line or json.dumps(exported.config, indent=2))
    for note in exported.notes:
        print(f"note: {note}", file=sys.stderr)


@require_extra("plot")
def plot(
    output: Annotated[Path, typer.Option(help="PNG file to write.")],
    model: Model = None,
    methods: Methods = "none,linear,ntk,yarn",
    factor: Factor = 4.0,
    original: Original = None,
    as_json: AsJson = False,
) -> None:
    """Plot how methods slow a model's pairs, and how attention decays with distance."""
    from hf_rope_ext.evals.plots import plot_curves
    from hf_rope_ext.planning.extension import curves, text_site

    geometry = text_site(read_model_config(model)[0], original).geometry
    data = curves(geometry, parse_methods(methods, factor), factor)
    if as_json:
        print_json(data)
    with writing(output):
        output.parent.mkdir(parents=True, exist_ok=True)
        plot_curves(data, output)
    if not as_json:
        print_line(f"wrote {output}")


def _inspection_table(inspection: Any) -> Table:
    trained = inspection.original_max_position_embeddings
    title = f"{inspection.model_type}: {inspection.path}"
    table = Table(title=title, title_justify="left", show_header=False)
    turning = [length for length in inspection.wavelengths if length is not None]
    rows = {
        "layer type": inspection.layer_type,
        "rope_theta": f"{inspection.rope_theta:g}",
        "rotated / head": f"{inspection.rotary_dim} / {inspection.head_dim or '?'} coordinates",
        "trained length": f"{trained or 'not in the config'}",
        "scaling": inspection.scaling.get("rope_type"),
        "saved patch": inspection.patch and patch_words(inspection.patch),
        "fastest pair": f"one turn in {turning[0]:.4g} positions",
        "slowest pair": f"one turn in {turning[-1]:.6g} positions",
        "never finish a turn": f"{inspection.unfinished_pairs} of {len(inspection.wavelengths)} "
        "pairs",
        "sliding window": inspection.window,
    }
    for name, value in rows.items():
        if value is not None:
            table.add_row(name, str(value))
    return table


def _pair_table(inspection: Any) -> Table:
    table = Table("pair", "positions per turn", "turns in training")
    rows = zip(inspection.wavelengths, inspection.turns, strict=True)
    for index, (length, turns) in enumerate(rows):
        table.add_row(str(index), "rests" if length is None else f"{length:.6g}", f"{turns:.4g}")
    return table


def _print_request(request: Any) -> None:
    print_line(str(request))
    for assumption in request.assumed:
        print_line(f"assumed: {assumption}")
    if len(set(request.factors.values())) > 1:
        print_line(f"by axis: factor={json.dumps(request.factors)}")
    if request.factor == 1.0:
        print_line("Within the trained length: nothing needs to be changed.")


def _print_extension(extension: Any, pairs: int) -> None:
    print_line(
        f"{extension.trained_length} -> {extension.target_length} positions: "
        f"factor {extension.factor:g}. "
        f"Keys and values of one sequence: {extension.cache_bytes / 2**30:.3g} GiB."
    )
    table = Table(title=f"{pairs} pairs", title_justify="left")
    table.add_column("method", no_wrap=True)
    for heading in ("kept", "between", "slowed in full", "unseen angles", "cos, sin", "nearest"):
        table.add_column(heading, justify="right")
    for label, effect in extension.effects.items():
        counts = (effect.kept, effect.between, effect.slowed_in_full, effect.unseen)
        scales = (f"x {effect.attention_scaling:.4g}", f"/ {effect.nearest:.4g}")
        table.add_row(label, *map(str, counts), *scales)
    console.print(table)
    for note in extension.advice:
        print_line(f"note: {note}")
    if extension.exported is not None:
        print_line(f"{extension.exported} for other engines:")
    for engine, line in extension.exports.items():
        print_line(f"  {engine}: {line}")
