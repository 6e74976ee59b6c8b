"""lm-eval task definitions that read their prompts from ``hf_rope_ext.evals``."""
