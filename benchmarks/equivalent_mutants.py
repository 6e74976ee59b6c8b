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
        "hf_rope_ext/evals/documents.py fit: size = (low + high) // 2 if high <= largest else "
        "2 * low + 1 -> size = (low + high) // 2 if high <= largest else 3 * low + 1",
    ),
    "Other tokens, in a call that keeps a cache or not, prove the loss as well": (
        "hf_rope_ext/finetune/loss.py _probe: ids = torch.arange(1, 9, device=weight.device)[None]"
        " * 7919 % max(vocabulary // 2, 2) -> ids = torch.arange(9, device=weight.device)[None]"
        " * 7919 % max(vocabulary // 2, 2)",
        "hf_rope_ext/finetune/loss.py _probe: ids = torch.arange(1, 9, device=weight.device)[None]"
        " * 7919 % max(vocabulary // 2, 2) -> ids = torch.arange(1, 9, device=weight.device)[None]"
        " * 7919 % max(vocabulary // 3, 2)",
        "hf_rope_ext/finetune/loss.py _probe: chunked = forward(input_ids=ids, labels=ids, "
        "use_cache=False).loss -> chunked = forward(input_ids=ids, labels=ids, "
        "use_cache=True).loss",
    ),
    "Inputs of another size show as well that a head is linear": (
        "hf_rope_ext/finetune/loss.py _ChunkedForward._sum_losses: sample = torch.linspace(-1000, "
        "1000, hidden.shape[-1]).to(head.weight)[None] -> sample = torch.linspace(-1000, 1001, "
        "hidden.shape[-1]).to(head.weight)[None]",
    ),
    "Offsets have two dimensions, of which the second is the last": (
        "hf_rope_ext/finetune/pose.py _shift: if positions.shape[-1] != offsets.shape[-1]: -> "
        "if positions.shape[-1] != offsets.shape[+1]:",
    ),
    "More words than the nearest are found, and the nearest is said": (
        "hf_rope_ext/checks.py suggest: near = difflib.get_close_matches(word, list(known), n=1, "
        "cutoff=cutoff) -> near = difflib.get_close_matches(word, list(known), cutoff=cutoff)",
        "hf_rope_ext/checks.py suggest: near = difflib.get_close_matches(word, list(known), n=1, "
        "cutoff=cutoff) -> near = difflib.get_close_matches(word, list(known), n=2, "
        "cutoff=cutoff)",
    ),
    "None is as false as False here": (
        "hf_rope_ext/positions/placement.py NextText: by_tokens: bool = False -> "
        "by_tokens: bool = None",
        "hf_rope_ext/saving/configs.py _modernize: older = False -> older = None",
    ),
    "A field becomes a parameter that nobody gives": (
        "hf_rope_ext/changes.py SetAttributes: before: Mapping[str, Any] | None = "
        "field(default=None, init=False) -> before: Mapping[str, Any] | None = None",
    ),
    "The tests run on the CPU, where nothing is moved": (
        'hf_rope_ext/positions/placement.py place_visual_tokens: result = position_ids.to("cpu", '
        "torch.float64) -> result = position_ids.to(torch.float64)",
    ),
    "A quotient of integers is rounded down by either operator": (
        "hf_rope_ext/evals/scoring.py _chunk: return int(max(LOGITS_AT_ONCE // vocabulary, 16)) "
        "-> return int(max(LOGITS_AT_ONCE / vocabulary, 16))",
    ),
    "A model without a config has no known vocabulary; chunks are half as large and scores equal": (
        "hf_rope_ext/evals/scoring.py _chunk: vocabulary = config.get_text_config().vocab_size if "
        "config is not None else 1 -> vocabulary = config.get_text_config().vocab_size if config "
        "is not None else 2",
    ),
}
"""Names of mutants by reason, as in the result file."""
