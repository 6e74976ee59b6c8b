"""The bundled tiny model: weights, tokenizer, held-out text and the script that made them."""

from pathlib import Path

DIRECTORY = Path(__file__).parent
"""Where `from_pretrained` finds the model."""

TEXT = DIRECTORY / "heldout.txt"
"""Text it was not trained on."""
