"""Commands that train: finetune and merge."""

from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from hf_rope_ext.cli.options import (
    AsJson,
    console,
    model_or_bundled,
    print_json,
    print_line,
    require_extra,
    require_filled,
)


@require_extra("finetune")
def finetune(
    context: typer.Context,
    fields: Annotated[bool, typer.Option("--fields", help="List the fields of a recipe.")] = False,
    as_json: AsJson = False,
) -> None:
    """Fine-tune a model for a longer context: [RECIPE.yaml] [--field value]...

    A recipe takes the fields that --fields lists and those of transformers' TrainingArguments;
    flags override the file. The model defaults to the bundled one. With --resume, an interrupted
    run continues from its last checkpoint.
    """
    from hf_rope_ext.assets import TEXT
    from hf_rope_ext.finetune.recipe import describe_flags, parse
    from hf_rope_ext.finetune.run import finetune as run

    if fields:
        table = Table("field", "default", "what it says")
        for row in describe_flags():
            table.add_row(*row)
        console.print(table)
        return
    words = context.args
    for flag in ("--model", "--data"):
        if f"{flag}=" in words or (flag, "") in pairwise(words):
            require_filled(flag, "")
    config = Path(words[0]) if words and not words[0].startswith("-") else None
    recipe, training = parse(words[config is not None :], config)
    if not recipe.model:
        recipe = replace(recipe, model=model_or_bundled(None), data=recipe.data or str(TEXT))
    done = run(recipe, training)
    if not training.should_save:
        return
    if as_json:
        print_json({"directory": str(done.directory), "before": done.before, "after": done.after})
        return
    table = Table("measured", "before", "after", title_justify="left")
    for name, value in done.after.items():
        before = done.before.get(name)
        table.add_row(name, "" if before is None else f"{before:.4g}", f"{value:.4g}")
    console.print(table)
    print_line(f"wrote {done.directory}")


@require_extra("finetune")
def merge(
    adapter: Annotated[Path, typer.Argument(help="Directory of a fine-tuned adapter.")],
    output: Annotated[Path, typer.Argument(help="Directory for the merged model.")],
    frozen: Annotated[
        int | None, typer.Option(help="Fix the plan to the one for this length, in positions.")
    ] = None,
) -> None:
    """Merge an adapter into its base model, with its RoPE in the plain config."""
    from hf_rope_ext.finetune.merge import merge_adapter

    merge_adapter(adapter, output, frozen=frozen)
    print_line(f"wrote {output}")
