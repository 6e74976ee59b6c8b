"""Methods that change the attention and not the frequencies."""
