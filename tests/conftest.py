import random
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import transformers
from transformers import LlamaConfig, LlamaForCausalLM

TRAINED = 64

# `make test-quick` runs what is parametrized by family, or by family and method, on these alone
QUICK_FAMILIES = {"llama", "gemma3_text", "qwen2_5_vl"}
QUICK_METHODS = {"yarn", "dynamic_yarn"}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark tests of every other family and method as sweeps."""
    for item in items:
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
