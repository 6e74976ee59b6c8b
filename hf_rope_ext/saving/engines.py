"""Translate a patch into another engine's configuration: config entries or command-line flags.

The forms follow the engines' sources (vLLM 07b12f1, SGLang 108c36c, llama.cpp). Those of
transformers are tested against it; for llama.cpp, none, linear, ntk and yarn were compared on
logits. Where an engine's computation differs, a note says so.
"""

import json
import shlex
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import nn

from hf_rope_ext.checks import require_choice, require_integer, shown
from hf_rope_ext.errors import ExportError
from hf_rope_ext.geometry import RopeGeometry
from hf_rope_ext.methods import NTK, Base, Linear, Method, NoScaling, NTKByParts, Yarn
from hf_rope_ext.methods.attention_method import attention_rules
from hf_rope_ext.models.family import Config
from hf_rope_ext.models.rope_config import stock_attributes
from hf_rope_ext.models.sites import RopeSite
from hf_rope_ext.patching.arguments import LONGEST, PatchArguments
from hf_rope_ext.patching.resolve import resolve
from hf_rope_ext.rotary.installed import patch_of
from hf_rope_ext.saving.loading import skeleton


@dataclass(frozen=True)
class Export:
    """The result of `export`.

    Args:
        target: The engine.
        config: Entries to change in the model's ``config.json``, nested as there; empty for engines
            that do not read it.
        flags: Command-line arguments of the engine; empty if the config suffices.
        notes: Differences in the engine's computation, and other requirements.
    """

    target: str
    config: dict[str, Any]
    flags: tuple[str, ...]
    notes: tuple[str, ...]

    @property
    def command_line(self) -> str:
        """The flags as one shell-quoted string."""
        return shlex.join(self.flags)


def export(
    model_or_config: nn.Module | Config,
    to: str = "transformers",
    *,
    frozen: int | None = None,
    method: str | Method = "none",
    **arguments: Any,
) -> Export:
    """Return the configuration that makes another engine equivalent to a patched model.

    Args:
        model_or_config: A patched model; or an unpatched model or its config, with the ``method``
            to extend it by.
        to: ``"transformers"``, ``"vllm"``, ``"sglang"`` or ``"llama.cpp"``.
        frozen: For a length-dependent method, export the plan of a request of this many positions,
            for use at every length.
        method: As in `patch_model`, for an unpatched model.
        **arguments: As in `patch_model`, for an unpatched model.

    Raises:
        ExportError: If the engine is unknown or cannot express the method.
    """
    from transformers import PreTrainedConfig

    require_choice("to", to, TARGETS, ExportError)
    if frozen is not None:
        require_integer("frozen", frozen, 1, LONGEST, unit="positions", error=ExportError)
    if not isinstance(model_or_config, nn.Module | PreTrainedConfig):
        raise ExportError(f"export takes a model or its config, got {shown(model_or_config)}.")
    model = model_or_config if isinstance(model_or_config, nn.Module) else None
    patch = None if model is None else patch_of(model)
    vision = None if model is None else patch_of(model, "vision")
    if vision is not None or arguments.get("target", "text") != "text":
        raise ExportError(
            f"{to} has no setting for the RoPE of a vision tower. Unpatch it, or save the model: "
            f"stock transformers loads 'ntk' and 'base', and load_pretrained every method."
        )
    if patch is not None and (method != "none" or arguments):
        raise ExportError(
            f"the model is patched with {patch.method!r}, which is what is exported; omit method "
            f"and its arguments, or unpatch the model first."
        )
    if patch is not None:
        resolved = patch
    else:
        request = PatchArguments.from_keywords(method, **arguments)
        resolved = resolve(request, skeleton(model_or_config) if model is None else model)
    if not resolved.has_stock_form:
        has_attention = attention_rules(resolved.method) is not None
        what = resolved.method.name if has_attention else "mrope_layout and visual_positions"
        raise ExportError(
            f"{to} has no form for {what}; load the model with hf_rope_ext.load_pretrained."
        )
    site, used = resolved.sites[0], resolved.method
    if frozen is not None:
        used = used.freeze(site.geometry, frozen)
    root = _root_config(model_or_config)
    lengths = {}
    for change in resolved.configs:
        config = change.owner
        geometry = next(site.geometry for site in resolved.sites if site.config is config)
        asked = used.target_length(geometry) or change.values.get("max_position_embeddings")
        lengths[id(config)] = asked or config.max_position_embeddings  # some configs have none
    settings = _Settings(resolved.sites, used, resolved.temperature, lengths, root)
    return TARGETS[to](settings)


@dataclass(frozen=True)
class _Settings:
    """The input of every target."""

    sites: list[RopeSite]
    method: Method
    temperature: str
    lengths: dict[int, int]
    root: Config

    @property
    def site(self) -> RopeSite:
        """The first site; engines have one method for the whole text model."""
        return self.sites[0]

    @property
    def length(self) -> int:
        """The length of the first site, in positions."""
        return self.lengths[id(self.site.config)]

    def attributes(self, config: Config) -> dict[str, Any]:
        """Return the new attributes of a text config for stock transformers."""
        sites = [site for site in self.sites if site.config is config]
        length = {"max_position_embeddings": self.lengths[id(config)]}
        return {**length, **stock_attributes(sites, self.method, self.temperature, length)}

    def changes(self) -> dict[str, Any]:
        """Return the changes to ``config.json``, nested as there."""
        changes: dict[str, Any] = {}
        for config in {id(site.config): site.config for site in self.sites}.values():
            inner = changes
            for name in _path_to(self.root, config):
                inner = inner.setdefault(name, {})
            inner.update(self.attributes(config))
        return changes

    def engine_changes(self, engine: str) -> tuple[dict[str, Any], dict[str, Any]]:
        """Return the changes as vLLM and SGLang read them, and the ``rope_parameters`` within them.

        Raises:
            ExportError: If the engine computes something else.
        """
        changes = self.changes()
        inner = changes
        for name in _path_to(self.root, self.site.config):
            inner = inner[name]
        parameters = inner["rope_parameters"]
        rope_type = parameters.get("rope_type", "nested by layer type")
        if "mrope_section" in parameters and rope_type not in ("default", "yarn"):
            raise ExportError(
                f"{engine} applies mrope_section only with rope_type 'default' and 'yarn', not "
                f"with {rope_type!r}, which {self.method.name} needs."
            )
        if rope_type == "dynamic":
            raise ExportError(
                f"{engine}'s 'dynamic' is one static base, unlike transformers'; export the "
                f"plan of one length with frozen=LENGTH."
            )
        inner["rope_parameters"] = parameters = _with_engine_temperature(parameters)
        return changes, parameters


def _transformers(settings: _Settings) -> Export:
    return Export("transformers", settings.changes(), (), ())


def _vllm(settings: _Settings) -> Export:
    changes, parameters = settings.engine_changes("vLLM")
    rope_type = parameters.get("rope_type")
    notes = []
    if rope_type == "proportional":
        raise ExportError("vLLM does not support rope_type 'proportional'.")
    if rope_type == "longrope":
        notes.append("vLLM selects one of longrope's lists at startup, by --max-model-len.")
    if rope_type == "yarn" and "mrope_section" in parameters:
        notes.append(
            "for M-RoPE models vLLM computes YaRN's ramp from 4 times the trained length; "
            "multiply beta_fast and beta_slow by 4 to compensate."
        )
    flags = ("--hf-overrides", json.dumps(changes), "--max-model-len", str(settings.length))
    return Export("vllm", changes, flags, tuple(notes))


def _sglang(settings: _Settings) -> Export:
    changes, _ = settings.engine_changes("SGLang")
    overrides = json.dumps(changes)
    flags = ("--json-model-override-args", overrides, "--context-length", str(settings.length))
    return Export("sglang", changes, flags, ())


def _with_engine_temperature(parameters: dict[str, Any]) -> dict[str, Any]:
    """Add the keys that vLLM and SGLang read in place of attention_factor."""
    if parameters.get("rope_type") == "longrope":
        scaling = parameters["attention_factor"]
        return {**parameters, "short_mscale": scaling, "long_mscale": scaling}
    if parameters.get("rope_type") == "yarn":
        usual = float(Yarn(parameters["factor"]).temperature(parameters["factor"]))
        share = parameters["attention_factor"] / usual
        return parameters if share == 1.0 else {**parameters, "attn_factor": share}
    return parameters


def _llama_cpp(settings: _Settings) -> Export:
    method, geometry = settings.method, settings.site.geometry
    context = ("--ctx-size", str(settings.length))
    parameters = method.rope_parameters(geometry) or {}
    if geometry.rotated_pairs is not None and not isinstance(method, NoScaling):
        raise ExportError("llama.cpp has no flags for a model with unrotated pairs (p-RoPE).")
    if isinstance(method, NoScaling):
        return Export("llama.cpp", {}, context, ())
    if isinstance(method, NTK | Base) and "rope_theta" in parameters:
        base = repr(parameters["rope_theta"])
        return Export("llama.cpp", {}, ("--rope-freq-base", base, *context), ())
    if type(method) is Linear:
        scale = repr(method.factor)
        return Export(
            "llama.cpp", {}, ("--rope-scaling", "linear", "--rope-scale", scale, *context), ()
        )
    if isinstance(method, NTKByParts) and not method.length_dependent:
        ramp = (method.ramp, method.blend, method.truncate)
        if ramp == ("index", "arithmetic", True):
            return _llama_cpp_yarn(method, geometry, context)
    raise ExportError(
        f"llama.cpp has no flags for {method.name}. Save the model for transformers and convert "
        f"that: the converter stores the factors of llama3 and longrope in the file."
    )


def _llama_cpp_yarn(method: NTKByParts, geometry: RopeGeometry, context: tuple[str, ...]) -> Export:
    temperature = float(method.plan(geometry).attention_scaling)
    usual = float(Yarn(method.factor).temperature(method.factor))
    flags = ["--rope-scaling", "yarn", "--rope-scale", repr(method.factor)]
    flags += ["--yarn-orig-ctx", str(geometry.original_max_position_embeddings)]
    notes = []
    for flag, value, default in (
        ("--yarn-beta-fast", method.beta_fast, 32.0),
        ("--yarn-beta-slow", method.beta_slow, 1.0),
        ("--yarn-attn-factor", temperature / usual, 1.0),
    ):
        if value != default:
            flags += [flag, repr(value)]
            notes.append(f"{flag} follows llama.cpp's source; its logits were not compared.")
    return Export("llama.cpp", {}, (*flags, *context), tuple(notes))


def _root_config(model_or_config: nn.Module | Config) -> Config:
    from transformers import PreTrainedModel

    if not isinstance(model_or_config, nn.Module):
        return model_or_config
    return next(
        part.config for part in model_or_config.modules() if isinstance(part, PreTrainedModel)
    )


def _path_to(root: Config, config: Config) -> list[str]:
    """Return the attribute names that lead from a whole config to one inside it."""
    if root is config:
        return []
    for name in getattr(root, "sub_configs", None) or {}:
        inner = getattr(root, name, None)
        if inner is config:
            return [name]
        if inner is not None and (rest := _path_to(inner, config)):
            return [name, *rest]
    return []


TARGETS: dict[str, Callable[[_Settings], Export]] = {
    "transformers": _transformers,
    "vllm": _vllm,
    "sglang": _sglang,
    "llama.cpp": _llama_cpp,
}
