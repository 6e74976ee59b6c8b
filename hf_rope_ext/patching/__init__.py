"""Put a method into a model, prove it, describe it, take it out."""
