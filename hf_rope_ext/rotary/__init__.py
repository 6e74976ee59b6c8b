"""The modules that stand in for a model's rotary embeddings."""
