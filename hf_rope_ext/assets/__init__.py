"""The bundled tiny model: weights, tokenizer and held-out text."""

from pathlib import Path

DIRECTORY = Path(__file__).parent
"""Directory to pass to `from_pretrained`."""

TEXT = DIRECTORY / "heldout.txt"
"""Text that the model was not trained on."""
