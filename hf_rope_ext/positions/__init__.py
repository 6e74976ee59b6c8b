"""M-RoPE layouts and the placement of visual tokens."""
