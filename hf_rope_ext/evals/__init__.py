"""Does the longer context work? Tasks, scores and reports; nothing here needs lm_eval."""
