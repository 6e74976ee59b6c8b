"""Fine-tune a patched model for a longer context, with adapters that record their RoPE."""

from hf_rope_ext.finetune.lora import (
    add_adapter,
    find_norms_and_embeddings,
    find_target_modules,
)
from hf_rope_ext.finetune.loss import chunked_loss
from hf_rope_ext.finetune.memory import estimate_memory
from hf_rope_ext.finetune.merge import merge_adapter
from hf_rope_ext.finetune.pose import position_skips
from hf_rope_ext.finetune.recipe import Recipe, parse
from hf_rope_ext.finetune.run import Finetuned, finetune
from hf_rope_ext.finetune.shifted import use_shifted_attention
from hf_rope_ext.finetune.trainer import LongContextTrainer, RememberRope
from hf_rope_ext.saving.adapters import load_adapter

__all__ = [
    "Finetuned",
    "LongContextTrainer",
    "Recipe",
    "RememberRope",
    "add_adapter",
    "chunked_loss",
    "estimate_memory",
    "find_norms_and_embeddings",
    "find_target_modules",
    "finetune",
    "load_adapter",
    "merge_adapter",
    "parse",
    "position_skips",
    "use_shifted_attention",
]
