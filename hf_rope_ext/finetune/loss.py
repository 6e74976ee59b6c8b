"""Cross-entropy over the vocabulary, a chunk of tokens at a time.

The logits of a long sequence are its largest tensor: at 32,768 tokens and 152k entries 18.5 GiB in
float32, and the same again for their gradient. Here the head runs on a chunk of tokens, the
chunk's gradient is taken on the spot, and its logits are gone before the next chunk starts. What
is left for the backward pass is the gradient of the hidden states, so nothing is computed twice.
"""

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from hf_rope_ext.errors import RopeError

IGNORED = -100
"""The label of a token that is not predicted, as in transformers."""

Head = Callable[[Tensor], Tensor]


class _HeadLoss(torch.autograd.Function):
    """The sum of the cross-entropies of all tokens, its gradient taken chunk by chunk.

    A sum and not a mean, so that under float16 the gradients kept until the backward pass do not
    underflow; the division, and the gradient scaler, come after.
    """

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, labels: Tensor, chunk: int, head: Head, *weights: Tensor
    ) -> Tensor:
        wanted = bool(ctx.needs_input_grad[0])
        hidden_grad = torch.empty_like(hidden) if wanted else None
        # summed over the chunks in float32: in bfloat16 small addends would be lost
        weight_grads = [torch.zeros_like(weight, dtype=torch.float32) for weight in weights]
        total = hidden.new_zeros((), dtype=torch.float32)
        for start in range(0, len(hidden), chunk):
            rows = slice(start, start + chunk)
            with torch.enable_grad():
                part = hidden[rows].detach().requires_grad_(wanted)
                logits = head(part[None])[0]
            loss, grad = _loss_and_grad(logits.detach(), labels[rows])
            found = list(torch.autograd.grad(logits, [part] * wanted + list(weights), grad))
            if hidden_grad is not None:
                hidden_grad[rows] = found.pop(0)
            for kept, own in zip(weight_grads, found, strict=True):
                kept += own
            total += loss
        ctx.save_for_backward(
            hidden_grad,
            *(kept.to(weight.dtype) for kept, weight in zip(weight_grads, weights, strict=True)),
        )
        return total

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad,) = grads
        hidden, *weights = ctx.saved_tensors
        scaled = None if hidden is None else (hidden * grad).to(hidden.dtype)
        return scaled, None, None, None, *((own * grad).to(own.dtype) for own in weights)


def chunked_cross_entropy(
    hidden: Tensor, labels: Tensor, head: Head, weights: Sequence[Tensor] = (), chunk: int = 512
) -> Tensor:
    """Return the summed cross-entropy of tokens without ever holding all their logits.

    Args:
        hidden: What goes into the head, ``(tokens, width)``.
        labels: ``(tokens,)``.
        head: From ``(1, tokens, width)`` to logits, ``(1, tokens, vocabulary)``.
        weights: The head's trainable parameters.
        chunk: Tokens at once.

    Returns:
        float32, a scalar.
    """
    trained = [weight for weight in weights if weight.requires_grad]
    if torch.is_grad_enabled() and (hidden.requires_grad or trained):
        apply: Any = _HeadLoss.apply
        found: Tensor = apply(hidden, labels, chunk, head, *trained)
        return found
    total = hidden.new_zeros((), dtype=torch.float32)
    for start in range(0, len(hidden), chunk):
        rows = slice(start, start + chunk)
        total += _sum(head, hidden[rows], labels[rows])
    return total


@contextmanager
def chunked_loss(model: nn.Module, chunk: int = 512, *, probe: bool = True) -> Iterator[None]:
    """Make a causal language model return its loss without its logits for a ``with`` block.

    The family's own ``forward`` is called twice: once for the hidden states, with no logits kept,
    and then for each chunk with a body that hands it the chunk, so that soft caps and scales of
    the logits are the family's own. Calls without labels are left alone.

    Args:
        model: A causal language model or the PEFT model around it.
        chunk: Tokens whose logits exist at once.
        probe: Whether to check first, on a few tokens, that the loss is the model's own.

    Raises:
        RopeError: If it is not.
    """
    causal = causal_model(model)
    if "forward" in vars(causal):
        raise RopeError(f"the forward of {type(causal).__name__} is replaced already.")
    _require_chunk(chunk)
    forward = _ChunkedForward(causal, chunk)
    if probe:
        _probe(causal, forward)
    causal.forward = forward
    try:
        yield
    finally:
        del causal.forward


def causal_model(model: nn.Module) -> Any:
    """Return the transformers model with the language model head inside any wrappers.

    Raises:
        RopeError: If there is none.
    """
    from transformers import PreTrainedModel

    for module in model.modules():
        if isinstance(module, PreTrainedModel) and module.get_output_embeddings() is not None:
            return module
    raise RopeError(f"{type(model).__name__} holds no model with a language model head.")


def body_name(causal: nn.Module) -> str:
    """Return under which name a causal language model holds the model below its head."""
    from transformers import PreTrainedModel

    for name, child in causal.named_children():
        if isinstance(child, PreTrainedModel):
            return name
    raise RopeError(f"{type(causal).__name__} has no model below its head; use loss='plain'.")


class _ChunkedForward:
    """The forward of a causal language model that computes its loss chunk by chunk."""

    def __init__(self, causal: Any, chunk: int) -> None:
        self.causal = causal
        self.chunk = chunk
        # Trainer drops the columns of a dataset that a forward does not name
        self.__signature__ = inspect.signature(causal.forward)

    def __call__(
        self,
        *args: Any,
        labels: Tensor | None = None,
        shift_labels: Tensor | None = None,
        num_items_in_batch: Tensor | int | None = None,
        **kwargs: Any,
    ) -> Any:
        """Return the family's output, with the loss and without logits where there are labels."""
        plain = type(self.causal).forward
        if shift_labels is None:
            if labels is None:
                return plain(self.causal, *args, **kwargs)
            shift_labels = functional.pad(labels, (0, 1), value=IGNORED)[..., 1:]
        outputs: list[Any] = []
        body = getattr(self.causal, body_name(self.causal))
        hook = body.register_forward_hook(lambda module, inputs, output: outputs.append(output))
        try:
            none = torch.empty(0, dtype=torch.int64, device=shift_labels.device)
            # return_dict: the head is read from a body's output by name
            found = plain(
                self.causal, *args, **{**kwargs, "logits_to_keep": none, "return_dict": True}
            )
        finally:
            hook.remove()
        if getattr(found, "aux_loss", None) is not None:
            raise RopeError(
                f"{type(self.causal).__name__} adds a loss of its own to the cross-entropy "
                f"(output_router_logits); use loss='plain'."
            )
        hidden = outputs[0].last_hidden_state
        flat = shift_labels.to(hidden.device).reshape(-1)
        kept = flat != IGNORED
        total = chunked_cross_entropy(
            hidden.reshape(-1, hidden.shape[-1])[kept],
            flat[kept],
            _Head(self.causal, type(outputs[0])),
            tuple(self.causal.get_output_embeddings().parameters()),
            self.chunk,
        )
        count = kept.sum() if num_items_in_batch is None else num_items_in_batch
        found["loss"] = total / (count.to(total.device) if isinstance(count, Tensor) else count)
        return found


class _Head:
    """What a family's forward does after its body."""

    def __init__(self, causal: Any, output: type[Any]) -> None:
        self.causal = causal
        self.output = output

    def __call__(self, hidden: Tensor) -> Tensor:
        def body(*args: Any, **kwargs: Any) -> Any:
            return self.output(last_hidden_state=hidden)

        stand_in = _StandIn(self.causal, body)
        logits: Tensor = (
            type(self.causal).forward(stand_in, input_ids=None, return_dict=True).logits
        )
        return logits


class _StandIn:
    """A causal language model whose body is replaced."""

    def __init__(self, causal: Any, body: Callable[..., Any]) -> None:
        self.__dict__["causal"] = causal
        self.__dict__[body_name(causal)] = body

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["causal"], name)


def _sum(head: Head, hidden: Tensor, labels: Tensor) -> Tensor:
    return functional.cross_entropy(head(hidden[None])[0].float(), labels, reduction="sum")


def _loss_and_grad(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Return the summed cross-entropy and its gradient, softmax minus one-hot.

    By hand, because autograd keeps four tensors of the logits' size for it; here it is one.
    """
    scores = torch.log_softmax(logits, dim=-1, dtype=torch.float32)
    places = labels[:, None]
    loss = -scores.gather(1, places).sum()
    grad = scores.exp_().scatter_add_(1, places, scores.new_full((len(labels), 1), -1))
    return loss, grad.to(logits.dtype)


def _require_chunk(chunk: int) -> None:
    if isinstance(chunk, bool) or not isinstance(chunk, int) or chunk < 1:
        raise RopeError(
            f"the loss's chunk must be a number of tokens of at least 1, got {chunk!r}."
        )


@torch.no_grad()
def _probe(causal: Any, forward: _ChunkedForward) -> None:
    """Check on a few tokens that the loss is the one the model itself computes."""
    weight = next(causal.parameters())
    vocabulary = causal.get_output_embeddings().weight.shape[0]
    ids = torch.arange(1, 9, device=weight.device)[None] * 7919 % max(vocabulary // 2, 2)
    training = causal.training
    causal.eval()
    small, forward.chunk = forward.chunk, 3
    try:
        expected = type(causal).forward(causal, input_ids=ids, labels=ids, use_cache=False).loss
        found = forward(input_ids=ids, labels=ids, use_cache=False).loss
    finally:
        forward.chunk = small
        causal.train(training)
    rounding = 1e-4 if weight.dtype == torch.float32 else 2e-2
    if not torch.allclose(found.float(), expected.float(), rtol=rounding, atol=rounding):
        raise RopeError(
            f"the chunked loss of {type(causal).__name__} is {float(found):.6g}, but its own is "
            f"{float(expected):.6g}: the family computes more than a cross-entropy of its logits. "
            f"Nothing was changed; use loss='plain'."
        )
