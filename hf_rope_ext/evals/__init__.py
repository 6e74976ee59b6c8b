"""Evaluation over context lengths: tasks, scores and reports; only `lm_eval` needs lm-eval."""
