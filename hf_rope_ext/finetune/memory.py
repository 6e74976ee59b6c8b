"""What a fine-tune takes in memory, before it starts."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from hf_rope_ext.errors import RopeError
from hf_rope_ext.finetune.lora import text_model

GIB = 2**30


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes on one device.

    Args:
        weights: All parameters and buffers.
        training: Gradients and AdamW's two moments of the trained ones.
        activations: What the backward pass needs of the decoder's layers.
        loss: Logits and their gradients.
        available: What the device has free, the weights that are on it already included.
        device: Which.
    """

    weights: int
    training: int
    activations: int
    loss: int
    available: int
    device: str

    @property
    def total(self) -> int:
        """All of it."""
        return self.weights + self.training + self.activations + self.loss

    def lines(self) -> list[str]:
        """Return it as text, a line for each part."""
        parts = ("weights", "training", "activations", "loss", "total", "available")
        return [f"{name:>12}: {getattr(self, name) / GIB:8.2f} GiB" for name in parts]

    def require_fit(self, advice: list[str]) -> None:
        """Raise if it is more than there is.

        Raises:
            RopeError: With ``advice`` on what to change.
        """
        if self.total > self.available:
            raise RopeError(
                f"training takes about {self.total / GIB:.1f} GiB on {self.device}, which has "
                f"{self.available / GIB:.1f} GiB ({'; '.join(self.lines()[:4])}). Nothing was "
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
    """Estimate what training takes, from shapes alone.

    Per token a layer keeps, in numbers: its input, what goes into attention and the MLP, queries,
    keys, values, the attention's output, and three of the MLP's width. With activation
    checkpointing only the input is kept, and the rest exists for one layer at a time.

    Args:
        model: The model as it is trained.
        tokens: In one forward.
        checkpointing: Whether activations are recomputed.
        offload: Whether the layers' inputs are kept in main memory.
        loss_chunk: Tokens whose logits exist at once, None for all.
        moment_bytes: The optimizer's bytes for each trained number.
        shards: Devices that weights and their gradients are spread over.
        device: Where the model will be trained; where it is if not given.
    """
    parameters = list(model.parameters())
    trained = [one for one in parameters if one.requires_grad]
    weights = sum(one.numel() * one.element_size() for one in parameters)
    training = sum(one.numel() * (one.element_size() + moment_bytes) for one in trained)
    _, text = text_model(model)
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
    shown = tokens if loss_chunk is None else min(loss_chunk, tokens)
    # the model's own logits, float32 ones, their log-softmax and its gradient
    loss = shown * config.vocab_size * (size + 12)
    here = parameters[0].device
    device = device or here
    available = _free(device) + (weights if here.type == device.type != "meta" else 0)
    return MemoryEstimate(
        weights // shards, training // shards, activations, loss, available, str(device)
    )


def out_of_memory(error: BaseException) -> bool:
    """Return whether an error says that memory ran out."""
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or (
        isinstance(error, RuntimeError) and "can't allocate memory" in str(error)
    )


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
