"""Proof that the plan of a request reaches the rotary embedding through the release's own cache.

How a cache travels from one call to the next differs between releases of transformers and models.
Instead of trusting names, a patched model with a length-dependent method runs on two tokens, once
in full and once as prefill and step, and must compute both with the same frequencies.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from hf_rope_ext.errors import ProbeError, RopeError
from hf_rope_ext.geometry import Scale
from hf_rope_ext.models import host
from hf_rope_ext.models.family import family_of
from hf_rope_ext.models.find import innermost_models
from hf_rope_ext.models.smallest_call import arguments_for
from hf_rope_ext.patching.probe import quiet
from hf_rope_ext.rotary.extended import ExtendedRotary
from hf_rope_ext.rotary.request_plan import row_lengths
from hf_rope_ext.rotary.running import Generation, announce

Seen = dict[tuple[str, str | None], tuple[Tensor, Scale]]
"""Frequencies and scaling of a call, by rotary module and layer type."""


def prove_cached_plans(model: nn.Module, rotaries: Mapping[str, ExtendedRotary]) -> None:
    """Check that a plan made for a prefill is the plan of the step that follows it.

    Raises:
        ProbeError: If it is not, or the model cannot be run this way.
    """
    for runners in innermost_models(model, rotaries):
        watched = [rotary for rotary in rotaries.values() if rotary in list(runners[0].modules())]
        if not _takes_cache(runners):
            continue  # an encoder: every call is a request of its own
        if any(family_of(runner.config).cacheless for runner in runners):
            continue
        failures: list[Exception] = []
        device = next(watched[0].buffers()).device
        for runner, tokens, arguments in _attempts(runners, device):
            try:
                with quiet(device), _as_it_was(runner):
                    _prove(runner, watched, tokens, arguments)
                break
            except RopeError:
                raise
            except Exception as error:
                failures.append(error)
        else:
            first = failures[0] if failures else TypeError("it takes no tokens")
            raise ProbeError(
                f"could not run {type(runners[0]).__name__} of {host.describe_release()} on two "
                f"tokens with a cache, to prove that a plan reaches the rotary embedding through "
                f"it ({type(first).__name__}: {first}). Nothing was changed; use a static method, "
                f"or pass probe=False to patch without this proof."
            ) from first


def _takes_cache(runners: list[nn.Module]) -> bool:
    """Return whether a model takes a cache, by its own forward or because it is what generates."""
    if host.cache_argument(runners[0].forward) is not None:
        return True
    is_encoder = getattr(runners[-1].config, "is_encoder_decoder", False)
    return not is_encoder and any(map(host.generates, runners))


def _attempts(
    runners: list[nn.Module], device: torch.device
) -> Iterator[tuple[Any, str, dict[str, Any]]]:
    """Yield models to run, the argument that holds their tokens, and their arguments."""
    for runner in runners:
        for arguments in arguments_for(runner, device):
            for name in ("decoder_input_ids", "input_ids"):
                if name in arguments:
                    yield runner, name, arguments
                    break


def _prove(
    runner: nn.Module, rotaries: list[ExtendedRotary], tokens: str, arguments: dict[str, Any]
) -> None:
    trained = max(
        rotation.geometry.original_max_position_embeddings
        for rotary in rotaries
        for rotation in rotary.rotations.values()
    )
    run: Callable[..., Any] = runner.forward if runner._compiled_call_impl else runner
    ids = arguments[tokens]
    name = host.cache_argument(runner.forward) or host.CACHES[0]
    ahead = 2 * trained

    def call(columns: slice, length: int | None, **cached: Any) -> tuple[Any, Seen]:
        with announce(Generation(length, reports=False)), _watched(rotaries) as seen:
            output = run(**_columns(arguments, ids.shape[:2], columns), **cached)
        return output, seen

    _, full = call(slice(None), ahead, use_cache=False)
    output, prefill = call(slice(0, 1), ahead, use_cache=True)
    cache = host.output_cache(output)
    if cache is None:  # as `generate` does, which hands an empty one over
        cache = host.new_cache(runner.config)
        _, prefill = call(slice(0, 1), ahead, use_cache=True, **{name: cache})
        if not cache.get_seq_length() and not host.generates(runner):
            return  # it leaves the cache alone: every call is a request of its own
    _, step = call(slice(1, 2), None, use_cache=True, **{name: cache})
    for rotary in rotaries:
        last = torch.tensor([[ahead - 1]], device=next(rotary.buffers()).device)
        for key, label in rotary.names().items():
            planned = rotary.frequencies_at(key, row_lengths(last))
            for part, seen in {"full forward": full, "prefill": prefill, "step": step}.items():
                found = seen.get((rotary.path, label), planned)
                if not all(map(_same, found, planned)):
                    raise ProbeError(
                        f"{rotary.path}: in {host.describe_release()} the {part} of "
                        f"{type(runner).__name__} is not computed under the plan of its request: "
                        f"the plan does not reach the rotary embedding through this model's cache. "
                        f"Nothing was changed; use a static method."
                    )


def _same(found: Scale, planned: Scale) -> bool:
    return bool(torch.all(torch.as_tensor(found == planned)))


def _columns(arguments: Mapping[str, Any], shape: torch.Size, columns: slice) -> dict[str, Any]:
    """Return arguments with those of shape ``(batch, seq, ...)`` cut to some of their tokens."""
    return {
        name: value[:, columns] if isinstance(value, Tensor) and value.shape[:2] == shape else value
        for name, value in arguments.items()
        if name != "use_cache"
    }


@contextmanager
def _watched(rotaries: list[ExtendedRotary]) -> Iterator[Seen]:
    """Record what each rotary embedding is planned for during a ``with`` block."""
    seen: Seen = {}
    for rotary in rotaries:

        def plan(
            label: str | None, position_ids: Tensor | None, rotary: ExtendedRotary = rotary
        ) -> tuple[Tensor, Scale]:
            found = ExtendedRotary.plan(rotary, label, position_ids)
            if position_ids is not None:
                seen[rotary.path, label] = found
            return found

        rotary.__dict__["plan"] = plan
    try:
        yield seen
    finally:
        for rotary in rotaries:
            rotary.__dict__.pop("plan", None)


@contextmanager
def _as_it_was(model: nn.Module) -> Iterator[None]:
    """Run outside training, and restore the notes on positions that a model keeps."""
    training = [part for part in model.modules() if part.training]
    notes = [
        (part, name, getattr(part, name))
        for part in model.modules()
        for name in host.POSITION_NOTES
        if hasattr(part, name)
    ]
    try:
        for part in training:
            part.training = False
        yield
    finally:
        for part in training:
            part.training = True
        for part, name, value in notes:
            setattr(part, name, value)
