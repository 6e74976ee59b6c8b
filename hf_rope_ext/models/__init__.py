"""What this package knows about transformers and its models."""
