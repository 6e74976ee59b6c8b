"""Liger's fused cross-entropy, without Liger's other kernels."""

import importlib.util
import inspect
import os
from typing import Any

from torch import nn

from hf_rope_ext.errors import RopeError
from hf_rope_ext.finetune.loss import find_causal_model


def use_liger_loss(training: Any, model: nn.Module) -> None:
    """Set TrainingArguments so that Trainer installs Liger's fused loss in the model.

    Raises:
        RopeError: If Liger is not installed, or cannot serve the device or the family.
    """
    if importlib.util.find_spec("liger_kernel") is None:
        raise RopeError("loss=liger needs liger-kernel: pip install liger-kernel")
    if training.device.type == "cpu" and not os.environ.get("TRITON_INTERPRET"):
        raise RopeError("loss=liger needs a GPU; use loss=chunked.")
    from liger_kernel.transformers.monkey_patch import MODEL_TYPE_TO_APPLY_LIGER_FN as FAMILIES

    model_type = find_causal_model(model).config.model_type
    apply = FAMILIES.get(model_type)
    kernels = set(inspect.signature(apply).parameters) - {"model"} if apply is not None else set()
    if "fused_linear_cross_entropy" not in kernels:
        # Liger leaves such a model as it is, with all its logits
        raise RopeError(f"Liger has no fused loss for {model_type!r}; use loss=chunked.")
    training.use_liger_kernel = True
    training.liger_kernel_config = {
        kernel: kernel == "fused_linear_cross_entropy" for kernel in kernels
    }
