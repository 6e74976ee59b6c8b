"""The commands of ``hf-rope``, and how it reports errors."""

import os
import sys

import typer

from hf_rope_ext.cli import comparing, inspecting, training
from hf_rope_ext.errors import RopeError

# lm-eval and the recipe of a fine-tuning run parse these arguments themselves
PASS_THROUGH = {"allow_extra_args": True, "ignore_unknown_options": True}

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Extend the context of RoPE models, and measure the effect.",
)
app.command()(inspecting.inspect)
app.command()(inspecting.plan)
app.command()(inspecting.export)
app.command()(comparing.compare)
app.command("eval", add_help_option=False, context_settings=PASS_THROUGH)(comparing.evaluate)
app.command()(inspecting.plot)
app.command(context_settings=PASS_THROUGH)(training.finetune)
app.command()(training.merge)


DEBUG = "HF_ROPE_DEBUG"
"""Environment variable under which an error ends in its traceback."""


def main() -> None:
    """Run the command; report an error as one line on stderr and exit status 2."""
    try:
        app()
    except Exception as error:
        if os.environ.get(DEBUG):
            raise
        text = " ".join(str(error).split())
        if not isinstance(error, RopeError):  # raised by a library, so its type is half the message
            text = f"{type(error).__name__}: {text} ({DEBUG}=1 shows the traceback)"
        print(f"hf-rope: error: {text}", file=sys.stderr)
        sys.exit(2)
