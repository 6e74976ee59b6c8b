"""Save a patched model so that plain transformers loads it, and print what other engines need.

Run it as ``python examples/save_for_stock_tools.py``; it needs no network.
"""

import tempfile

import torch
from transformers import AutoModelForCausalLM

from hf_rope_ext import assets, export, patch_model

model = AutoModelForCausalLM.from_pretrained(assets.DIRECTORY)
patch_model(model, "ntk_mixed", factor=4)  # transformers has no such type
ids = torch.arange(1, 500)[None]

with tempfile.TemporaryDirectory() as directory, torch.no_grad():
    model.save_pretrained(directory)
    stock = AutoModelForCausalLM.from_pretrained(directory)
    print("written as:", stock.config.rope_parameters["rope_type"])
    print("largest difference:", float((stock(ids).logits - model(ids).logits).abs().max()))

plain = AutoModelForCausalLM.from_pretrained(assets.DIRECTORY)
for engine in ("vllm", "llama.cpp"):
    print(f"{engine}: {export(plain, engine, method='yarn', factor=4).command_line}")
