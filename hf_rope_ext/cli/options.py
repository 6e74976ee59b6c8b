"""Options, output and lookups that several commands share."""

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path
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


def read_model_config(model: str | None) -> tuple[Any, dict[str, Any] | None]:
    """Return the config of a model, or of the bundled one, as before any recorded patch.

    Returns:
        The config, and the record of the patch that the model was saved with.
    """
    from hf_rope_ext.saving.loading import read_config

    # where this is not given, transformers asks on the terminal whether to run a model's own code
    return read_config(model_or_bundled(model), trust_remote_code=False)


def patch_words(record: Mapping[str, Any]) -> str:
    """Return the recorded patch of a model in words: its method, factor and target."""
    method = record["method"]
    factor = f", factor {method['factor']:g}" if method.get("factor") is not None else ""
    where = "vision towers: " if record.get("target") == "vision" else ""
    more = f"; {patch_words(record['vision'])}" if "vision" in record else ""
    return f"{where}{method['name']}{factor}{more}"


def model_or_bundled(model: str | None) -> str:
    """Return the model asked for, or the directory of the bundled one.

    Raises:
        RopeError: If the model is an empty string, as from a variable that is not set.
    """
    from hf_rope_ext.assets import DIRECTORY

    if model is None:
        return str(DIRECTORY)
    require_filled("MODEL", model)
    return model


def require_filled(name: str, value: str) -> None:
    """Check that an argument is not empty.

    Raises:
        RopeError: If it is.
    """
    if not value.strip():
        raise RopeError(f"{name} is empty; omit it for the bundled model, or name another.")


@contextmanager
def require_extra(name: str) -> Iterator[None]:
    """Turn a failed import into an error that names the extra to install; also a decorator."""
    try:
        yield
    except ImportError as error:
        missing = missing_packages(name)
        if not missing:
            raise
        raise RopeError(
            f"{', '.join(missing)} missing: pip install 'hf-rope-ext[{name}]'"
        ) from error


def missing_packages(extra: str) -> list[str]:
    """Return the requirements of an extra that are not installed, or in an older version."""
    from packaging.requirements import Requirement

    missing = []
    for requirement in map(Requirement, requires("hf-rope-ext") or ()):
        if requirement.marker is None or not requirement.marker.evaluate({"extra": extra}):
            continue
        try:
            found = version(requirement.name)
        except PackageNotFoundError:
            found = ""
        if not (found and requirement.specifier.contains(found, prereleases=True)):
            missing.append(f"{requirement.name}{requirement.specifier}")
    return missing


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn a failure to write a file into an error that names it."""
    try:
        yield
    except (OSError, ValueError) as error:
        raise RopeError(f"cannot write {str(path)!r}: {error}") from error


def require_device(device: str) -> None:
    """Check that a device can be used, before a model is loaded for it.

    Raises:
        RopeError: If it cannot.
    """
    import torch

    try:
        torch.empty(0, device=device)
    except (AssertionError, NotImplementedError, RuntimeError) as error:
        reason = str(error).splitlines()[0]
        raise RopeError(f"--device {device!r} cannot be used here: {reason}") from error


def print_line(text: str) -> None:
    """Print a line as it is, neither wrapped nor highlighted."""
    console.print(text, markup=False, highlight=False, soft_wrap=True)


def print_json(value: Any) -> None:
    """Print a value as indented JSON."""
    print(json.dumps(value, indent=2))
