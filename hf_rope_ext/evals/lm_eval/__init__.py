"""lm-eval's model, tasks and command; nothing else imports lm-eval."""
