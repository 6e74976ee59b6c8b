"""Plans, caches and generation: what a request computes with, from its first token to its last."""
