import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from transformers import LlamaConfig, LlamaForCausalLM

TRAINED = 64

# `make test-quick` runs what is parametrized by family, or by family and method, on these alone
QUICK_FAMILIES = {"llama", "gemma3_text", "qwen2_5_vl"}
QUICK_METHODS = {"yarn", "dynamic_yarn"}


# the suite that runs on every supported release of transformers: `make test-releases`
CORE_FILES = (
    "attention/test_mrope.py",
    "attention/test_patches.py",
    "attention/test_training.py",
    "cache/test_generation.py",
    "cache/test_planner.py",
    "cache/test_rerotation.py",
    "models/test_mrope_families.py",
    "patching/test_cache_proof.py",
    "patching/test_changes.py",
    "patching/test_patch.py",
    "patching/test_probe.py",
    "rotary/test_request_plan.py",
    "saving/test_adapters.py",
    "test_readme.py",
)
CORE_TYPES = (
    "cohere", "deepseek_v3", "falcon_h1", "gemma3_text", "glm4", "gpt_neox", "gpt_oss", "gptj",
    "granite", "llama", "llama4_text", "mistral", "mllama", "olmo2", "phi3", "qwen2", "qwen2_vl",
    "qwen3", "qwen3_vl", "stablelm",
)  # fmt: skip
CORE_TESTS = {
    "attention/test_bands.py": (
        "test_logits_are_those_of_the_definition",
        "test_cached_logits_are_those_of_the_definition",
    ),
    "evals/test_lm_eval.py": ("test_a_greedy_continuation_is_told",),
    "finetune/test_finetune_run.py": ("test_a_run_leaves_an_adapter_a_log_a_curve_and_numbers",),
    "models/test_families.py": (
        "test_patched_equals_stock_as_published_and_unpatched_equals_before",
        "test_a_patch_replaces_the_rotary_modules_of_the_text_alone_and_leaves_nothing",
    ),
    "saving/test_loading.py": (
        "test_every_family_is_saved_so_that_stock_loads_it_or_says_that_it_cannot",
    ),
}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark tests of every other family and method as sweeps, and the core suite."""
    for item in items:
        if _is_core(item):
            item.add_marker(pytest.mark.core)
        parameters = getattr(item, "callspec", None)
        values = parameters.params if parameters else {}
        family = values.get("family", values.get("model_type"))
        method = values.get("method", values.get("name", "yarn"))
        if family is not None and not (family in QUICK_FAMILIES and method in QUICK_METHODS):
            item.add_marker(pytest.mark.sweep)


@pytest.fixture(autouse=True)
def _seeded() -> None:
    random.seed(0)
    torch.manual_seed(0)
    transformers.utils.logging.disable_progress_bar()


@pytest.fixture
def ids() -> torch.Tensor:
    """Two rows of 200 tokens, more than three times the trained length."""
    return torch.randint(0, 128, (2, 200), generator=torch.Generator().manual_seed(0))


def tiny_llama(rope: dict[str, Any] | None = None, **settings: Any) -> LlamaForCausalLM:
    """A random Llama of 64 trained positions with sharp attention; its weights never change."""
    torch.manual_seed(0)
    small = {
        "vocab_size": 128,
        "hidden_size": 64,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": TRAINED,
        "initializer_range": 0.2,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, **(rope or {})},
    }
    return LlamaForCausalLM(LlamaConfig(**{**small, **settings})).eval()


@pytest.fixture
def llama() -> LlamaForCausalLM:
    return tiny_llama()


def logits(model: torch.nn.Module, ids: torch.Tensor, **arguments: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(ids, **arguments).logits


def relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Largest difference, as a share of the largest number."""
    return float((found - expected).abs().max() / expected.abs().max())


@pytest.fixture
def caught(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """What transformers logs as a warning or worse."""
    import logging

    lines: list[str] = []

    class Handler(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            lines.append(record.getMessage())

    handler = Handler(logging.WARNING)
    logger = logging.getLogger("transformers")
    logger.addHandler(handler)
    yield lines
    logger.removeHandler(handler)


def _is_core(item: pytest.Item) -> bool:
    file = item.path.relative_to(Path(__file__).parent).as_posix()
    name, _, parameters = item.name.partition("[")
    if file in CORE_FILES:
        return True
    return name in CORE_TESTS.get(file, ()) and (
        not parameters or not set(CORE_TYPES).isdisjoint(parameters.rstrip("]").split("-"))
    )
