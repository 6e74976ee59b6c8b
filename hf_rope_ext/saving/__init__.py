"""Saving a patched model, loading it again, and exporting it to other engines."""
