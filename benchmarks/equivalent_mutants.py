"""Mutants that were read and judged to be the same program, or no worse a one, and why."""

EQUIVALENT: dict[str, str] = {}
