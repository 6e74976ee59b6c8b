"""Options, output and lookups that several commands share."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated, Any

import typer
from rich.console import Console

from hf_rope_ext.errors import RopeError

console = Console()

Model = Annotated[
    str | None, typer.Argument(help="Model directory or hub id; defaults to the bundled model.")
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")]
Original = Annotated[
    int | None,
    typer.Option("--original", help="Trained length in positions, if the config's is wrong."),
]
Methods = Annotated[
    str,
    typer.Option(
        "--methods",
        "--method",
        help="Comma-separated method names; knobs follow after colons: yarn:beta_fast=16.",
    ),
]
Factor = Annotated[float, typer.Option(help="Factor for every method that takes one.")]


def read_model_config(model: str | None) -> Any:
    """Return the config of a model, or of the bundled one."""
    from hf_rope_ext.saving.loading import read_config

    return read_config(model or bundled_model())[0]


def bundled_model() -> str:
    """Return the directory of the bundled model."""
    from hf_rope_ext.assets import DIRECTORY

    return str(DIRECTORY)


@contextmanager
def require_extra(name: str) -> Iterator[None]:
    """Turn a failed import into an error that names the extra to install."""
    try:
        yield
    except ImportError as error:
        raise RopeError(f"{error}: pip install 'hf-rope-ext[{name}]'") from error


def print_line(text: str) -> None:
    """Print a line as it is, neither wrapped nor highlighted."""
    console.print(text, markup=False, highlight=False, soft_wrap=True)


def print_json(value: Any) -> None:
    """Print a value as indented JSON."""
    print(json.dumps(value, indent=2))
