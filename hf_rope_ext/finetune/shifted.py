"""Train in shifted groups: the change of attention, as a part of the model's patch."""

from torch import nn

from hf_rope_ext.attention.shifted import ShiftedAttention
from hf_rope_ext.errors import AlreadyScaledError, RopeError
from hf_rope_ext.methods.attention_method import attention_rules
from hf_rope_ext.patching.patch import patch_model
from hf_rope_ext.rotary.installed import patch_of


def use_shifted_attention(model: nn.Module, groups: int = 4) -> None:
    """Make a model attend in shifted groups while it trains (S2-Attn).

    The change belongs to the model's patch and is undone with it by `unpatch_model`. A model that
    is not patched is patched with ``"none"`` for it. In ``eval()`` the attention is full.

    Args:
        model: A transformers model or a PEFT model around one.
        groups: Number of groups that a sequence is cut into; the paper takes 4.

    Raises:
        RopeError: If the family does not use transformers' attention interface, the patch has an
            attention of its own, or ``groups`` is less than 2. Nothing is changed then.
    """
    change = ShiftedAttention(model, groups)
    patch = patch_of(model)
    if patch is not None and attention_rules(patch.method) is not None:
        raise RopeError(
            f"shifted attention and {patch.method.name} both replace the attention; patch the "
            f"model with a method that changes frequencies alone, or train with full attention."
        )
    if patch is None:
        try:
            patch_model(model, "none")
        except AlreadyScaledError as error:
            raise RopeError(
                "shifted attention belongs to a patch, and this model's RoPE is scaled by its own "
                "config; patch it first (patch_model with replace=True)."
            ) from error
        patch = patch_of(model)
    assert patch is not None
    for earlier in [other for other in patch.changes if isinstance(other, ShiftedAttention)]:
        earlier.revert()
        patch.changes.remove(earlier)
    change.apply()
    patch.changes.append(change)
