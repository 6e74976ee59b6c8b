"""Mutants that were read and judged no worse a program than the one they were made of, and why."""

EQUIVALENT: dict[str, tuple[str, ...]] = {
    "A search that begins elsewhere or takes other steps finds the same size": (
        "hf_rope_ext/evals/documents.py build: guess = guesses.get(key, length // 16) -> "
        "guess = guesses.get(key, length // 17)",
        "hf_rope_ext/evals/documents.py fit: if size > smallest and used > low_tokens and "
        "step < 8: -> if size > smallest and used > low_tokens and step < 9:",
        "hf_rope_ext/evals/documents.py fit: if size > smallest and used > low_tokens and "
        "step < 8: -> if size > smallest and used > low_tokens and step <= 8:",
        "hf_rope_ext/evals/documents.py fit: if size > smallest and used > low_tokens and "
        "step < 8: -> if size >= smallest and used > low_tokens and step < 8:",
    ),
}
"""Names of mutants by reason, as in the result file."""
