"""What a patched model leaves on disk, and how it comes back."""
