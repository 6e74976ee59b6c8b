"""The ``hf-rope`` command."""
