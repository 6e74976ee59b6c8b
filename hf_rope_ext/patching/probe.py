"""Proof that a patch took effect: the rotary embedding computes the plan, the attention uses it."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from hf_rope_ext.errors import ProbeError
from hf_rope_ext.models import host
from hf_rope_ext.models.find import innermost_models
from hf_rope_ext.models.sites import RopeSite
from hf_rope_ext.models.smallest_call import arguments_for
from hf_rope_ext.rotary.extended import ExtendedRotary
from hf_rope_ext.rotary.extended_table import ExtendedTable
from hf_rope_ext.rotary.rotation import Rotation
from hf_rope_ext.rotary.running import Generation, announce
from hf_rope_ext.rotary.vision_towers import pairs_by_axis, shape_position, tower_axes


class _ReachedError(Exception):
    """The rotary embedding's output has reached another tensor."""


def probe_rotary(rotaries: Mapping[str, ExtendedRotary]) -> None:
    """Check that each rotary embedding rotates by the planned angles.

    Whatever the family's layout, its output at a position contains the cosine (and sine) of every
    pair's angle times the scaling. Two positions within the trained length are checked, and two
    towards the end of the plan.

    Raises:
        ProbeError: If a planned cosine is missing from the output.
    """
    for path, rotary in rotaries.items():
        learned = isinstance(rotary.original, nn.Module) and rotary.original.state_dict()
        if learned:
            continue  # the family modifies the frequencies by learned weights
        for label, rotation in rotary.rotations.items():
            _check_angles(path, rotary, label, rotation)


def probe_towers(sites: Iterable[RopeSite], rotaries: Mapping[str, ExtendedRotary]) -> None:
    """Check that each vision tower rotates by the planned angles along each axis.

    Raises:
        ProbeError: If a planned cosine is missing from the output.
    """
    for site in sites:
        rotary = rotaries[site.path]
        frequencies, scaling = rotary.plan(None, None)
        method, trained = rotary.rotations[None].method, site.geometry
        last = (method.target_length(trained) or trained.original_max_position_embeddings) - 1
        for axis, used in enumerate(pairs_by_axis(site)):
            inv_freq = frequencies[axis] if frequencies.ndim == 2 else frequencies
            for position in {1, trained.original_max_position_embeddings, max(last, 1)}:
                point = torch.zeros(len(tower_axes(site)), device=inv_freq.device)
                point[axis] = position
                expected = (position * inv_freq[used].double()).cos() * scaling
                places = shape_position(site.rotary.original, point)
                cos, _ = rotary(torch.zeros(1, 1, 1, device=inv_freq.device), places)
                _require_angles(site.path, rotary, position, expected, cos.flatten().double())


def probe_attention(
    model: nn.Module,
    rotaries: Mapping[str, ExtendedRotary],
    inputs: Callable[[nn.Module, torch.device], list[dict[str, Any]]] | None = None,
) -> None:
    """Check that the attention uses the rotary embedding.

    The frequencies are set to NaN temporarily and the model runs on two tokens, or on what
    ``inputs`` returns, until the rotary embedding's output meets another tensor: a query, in the
    first attention that rotates.

    Raises:
        ProbeError: If it never does, or the model cannot be run this way.
    """
    for runners in innermost_models(model, rotaries):
        watched = [rotary for rotary in rotaries.values() if rotary in list(runners[0].modules())]
        failures = []
        device = next(watched[0].buffers()).device
        attempts = [
            (part, arguments)
            for part in runners
            for arguments in (inputs or arguments_for)(part, device)
        ]
        for runner, arguments in attempts:
            try:
                with _poisoned(watched), quiet(device), _Watch(watched):
                    # inside a compiled model nothing could be observed
                    (runner.forward if runner._compiled_call_impl else runner)(**arguments)
            except _ReachedError:
                break
            except Exception as error:
                failures.append(error)
            else:
                raise ProbeError(
                    f"the attention of {type(runners[0]).__name__} does not use its rotary "
                    f"embedding: a fused kernel or a table of its own takes its place. Nothing was "
                    f"changed."
                )
        else:
            raise ProbeError(
                f"could not run {type(runners[0]).__name__} on "
                f"{'two tokens' if inputs is None else 'a small image'} to prove that its "
                f"attention sees the new frequencies ({type(failures[0]).__name__}: "
                f"{failures[0]}). Nothing was changed; pass probe=False to patch without this "
                f"proof."
            ) from failures[0]


def _check_angles(path: str, rotary: ExtendedRotary, label: str | None, rotation: Rotation) -> None:
    geometry = rotation.geometry
    trained = geometry.original_max_position_embeddings
    last = (rotation.method.target_length(geometry) or trained) - 1
    for position in {1, trained - 1, trained, max(last, trained)}:
        position_ids = torch.tensor([[position]], device=next(rotary.buffers()).device)
        frequencies, scaling = rotary.plan(label, position_ids)
        angles = position * rotation.drop_unused_axes(frequencies).reshape(-1).double()
        expected = (
            angles.cos() * scaling
            if isinstance(scaling, float)
            else (angles.cos() * scaling.reshape(-1).double())
        )
        values = _values(rotary, label, position_ids)
        _require_angles(path, rotary, position, expected, values)


def _require_angles(
    path: str, rotary: ExtendedRotary, position: int, expected: Tensor, values: Tensor
) -> None:
    """Check that every expected cosine is among the numbers found."""
    distance = (expected[:, None] - values[None, :].to(expected.device)).abs().amin(dim=1)
    # float32 rounds an angle by up to 2 ** -24 of itself
    if not (distance <= 1e-3 + 4e-7 * position).all():
        raise ProbeError(
            f"{path}: {type(rotary.original).__name__} does not rotate by the planned angles "
            f"at position {position}; it does not compute its frequencies from inv_freq. Nothing "
            f"was changed."
        )


def _values(rotary: ExtendedRotary, label: str | None, position_ids: Tensor) -> Tensor:
    """Return every number of the rotary embedding's output at one position, float64."""
    if isinstance(rotary, ExtendedTable):
        return rotary.rows(position_ids).double().flatten()
    x = torch.zeros(1, 1, 1, device=position_ids.device)
    try:
        output = rotary(x, position_ids) if label is None else rotary(x, position_ids, label)
    except Exception as error:
        raise ProbeError(
            f"{rotary.path}: {type(rotary.original).__name__} of {host.describe_release()} cannot "
            f"be run on one position to prove that it rotates by the planned angles "
            f"({type(error).__name__}: {error}). Nothing was changed."
        ) from error
    parts = output if isinstance(output, tuple) else (output,)
    return torch.cat(
        [(torch.view_as_real(part) if part.is_complex() else part).flatten() for part in parts]
    ).double()


@contextmanager
def _poisoned(rotaries: Iterable[ExtendedRotary]) -> Iterator[None]:
    with ExitStack() as stack:
        for rotary in rotaries:
            stack.enter_context(rotary.poison_frequencies())
        yield


@contextmanager
def quiet(device: torch.device) -> Iterator[None]:
    """Run without side effects: no gradients, same random state, outside any request."""
    devices = [device] if device.type == "cuda" else []
    nothing = announce(Generation())
    with nothing, torch.no_grad(), torch.random.fork_rng(devices=devices):
        yield


class _Watch(TorchFunctionMode):
    """Raises when a NaN tensor meets a finite one outside the rotary modules."""

    def __init__(self, rotaries: Iterable[ExtendedRotary]) -> None:
        super().__init__()
        self.rotaries = list(rotaries)
        self.inside = False

    def __enter__(self) -> "_Watch":
        for rotary in self.rotaries:
            for name in ("forward", "rows"):
                if hasattr(type(rotary), name):
                    rotary.__dict__[name] = partial(self._unwatched, getattr(rotary, name))
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)  # type: ignore[no-untyped-call]
        for rotary in self.rotaries:
            for name in ("forward", "rows"):
                rotary.__dict__.pop(name, None)

    def __torch_function__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        if not self.inside:
            with torch._C.DisableTorchFunction():
                meets = {_is_poisoned(part) for part in _tensors((args, kwargs))}
            if meets >= {True, False}:
                raise _ReachedError
        return func(*args, **(kwargs or {}))

    def _unwatched(self, function: Any, *args: Any, **kwargs: Any) -> Any:
        self.inside = True
        try:
            return function(*args, **kwargs)
        finally:
            self.inside = False


def _is_poisoned(tensor: Tensor) -> bool:
    # what is computed from two positions is smaller than a weight; quantized weights have no isnan
    if type(tensor) not in (Tensor, nn.Parameter) or tensor.is_meta or tensor.numel() > 1_000_000:
        return False
    return bool(tensor.isnan().any())


def _tensors(values: Any) -> Iterator[Tensor]:
    """Yield the float and complex tensors with more than one number among arguments."""
    if isinstance(values, Tensor):
        if (values.is_floating_point() or values.is_complex()) and values.numel() > 1:
            yield values
    elif isinstance(values, dict):
        yield from _tensors(tuple(values.values()))
    elif isinstance(values, tuple | list):
        for value in values:
            yield from _tensors(value)
