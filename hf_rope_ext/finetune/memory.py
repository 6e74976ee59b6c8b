"""Estimate the memory that a fine-tune will use, before it starts."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from hf_rope_ext.errors import RopeError
from hf_rope_ext.finetune.lora import find_text_model

GIB = 2**30


@dataclass(frozen=True)
class MemoryEstimate:
    """Memory of one device, in bytes.

    Args:
        weights: All parameters.
        training: Gradients and AdamW's two moments of the trained parameters.
        activations: Activations of the decoder's layers kept for the backward pass.
        loss: Logits and their gradients.
        available: Free memory of the device, including the weights that are already on it.
        device: The device's name.
    """

    weights: int
    training: int
    activations: int
    loss: int
    available: int
    device: str

    @property
    def total(self) -> int:
        """The sum of all parts."""
        return self.weights + self.training + self.activations + self.loss

    def lines(self) -> list[str]:
        """Return the estimate as text, one line per part."""
        parts = ("weights", "training", "activations", "loss", "total", "available")
        return [f"{name:>12}: {getattr(self, name) / GIB:8.2f} GiB" for name in parts]

    def require_fit(self, advice: list[str]) -> None:
        """Check that the estimate fits the device.

        Raises:
            RopeError: If it does not; the message lists ``advice``.
        """
        if self.total > self.available:
            raise RopeError(
                f"training needs about {self.total / GIB:.1f} GiB on {self.device}, which has "
                f"{self.available / GIB:.1f} GiB free ({'; '.join(self.lines()[:4])}). Nothing was "
                f"started. Try: {'; '.join(advice)}. check_memory=false starts anyway."
            )


def estimate_memory(
    model: nn.Module,
    tokens: int,
    *,
    checkpointing: bool = True,
    offload: bool = False,
    loss_chunk: int | None = 512,
    moment_bytes: int = 8,
    shards: int = 1,
    device: torch.device | None = None,
) -> MemoryEstimate:
    """Estimate the memory of training, from shapes alone.

    Per token, a layer keeps its input, the inputs of attention and MLP, queries, keys, values, the
    attention output, and four tensors of the MLP's width. With activation checkpointing only the
    input is kept, and the rest exists for one layer at a time.

    Args:
        model: The model, with its adapter.
        tokens: Tokens per forward pass.
        checkpointing: Whether activations are recomputed.
        offload: Whether the layers' inputs are kept in main memory.
        loss_chunk: Tokens whose logits are in memory at once, None for all.
        moment_bytes: Bytes of optimizer state per trained parameter.
        shards: Devices over which weights and gradients are sharded.
        device: Where the model will be trained; its current device by default.
    """
    parameters = list(model.parameters())
    weights = sum(weight.nbytes for weight in parameters)
    trained = [weight for weight in parameters if weight.requires_grad]
    training = sum(weight.nbytes + weight.numel() * moment_bytes for weight in trained)
    _, text = find_text_model(model)
    config: Any = text.config
    size = _activation_bytes(model)
    hidden, layers = config.hidden_size, config.num_hidden_layers
    heads = config.num_attention_heads
    head = getattr(config, "head_dim", None) or hidden // heads
    groups = getattr(config, "num_key_value_heads", None) or heads
    mlp = getattr(config, "intermediate_size", None) or 4 * hidden
    inside = 4 * hidden + 2 * (heads + 2 * groups) * head + heads * head + 4 * mlp
    if checkpointing:
        kept = 0 if offload else layers * hidden
        activations = tokens * (kept + 2 * inside) * size
    else:
        activations = tokens * layers * inside * size
    rows = tokens if loss_chunk is None else min(loss_chunk, tokens)
    # the logits in the model's dtype and in float32, their log-softmax, and its gradient
    loss = rows * config.vocab_size * (size + 12)
    current = parameters[0].device
    device = device or current
    available = _free(device) + (weights if current.type == device.type != "meta" else 0)
    return MemoryEstimate(
        weights // shards, training // shards, activations, loss, available, str(device)
    )


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether an error means that memory ran out."""
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or (
        isinstance(error, RuntimeError) and "can't allocate memory" in str(error)
    )


@contextmanager
def explain_out_of_memory() -> Iterator[None]:
    """Turn a lack of memory in a ``with`` block into an error that says what to change.

    Raises:
        RopeError: If memory runs out.
    """
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        reason = str(error).partition("\n")[0]
        raise RopeError(
            f"the device ran out of memory: {reason}. Checkpoints saved so far "
            f"are kept. Use a shorter sequence_length, activation_checkpointing=true, "
            f"loss=chunked, quantize=4bit, or pose_length."
        ) from error


def _activation_bytes(model: nn.Module) -> int:
    sizes = [
        parameter.element_size()
        for parameter in model.parameters()
        if parameter.is_floating_point() and not parameter.requires_grad
    ]
    return min(sizes, default=4)


def _free(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    import psutil

    return int(psutil.virtual_memory().available)
