"""What this package knows of transformers and its models."""
