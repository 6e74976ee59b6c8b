"""Task classes, one file per family: questions of any size, and pure scorers; no model."""
