"""Model, tasks and command for lm-eval; no other package imports lm-eval."""
