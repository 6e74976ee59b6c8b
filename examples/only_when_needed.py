"""Scale by what each request needs: short prompts are untouched, long ones get their own factor.

Run it as ``python examples/only_when_needed.py``; it needs no network.
"""

import torch
from transformers import AutoModelForCausalLM

from hf_rope_ext import assets, patch_model, planned, request_plan

model = AutoModelForCausalLM.from_pretrained(assets.DIRECTORY)  # trained at 512 tokens
short, long = torch.arange(1, 101)[None], torch.arange(1, 501).repeat(2)[None]
with torch.no_grad():
    before = model(short).logits

patch_model(model, "dynamic_yarn", factor=4, on_plan=lambda plan: print("  factors", plan.factors))

with torch.no_grad():
    print("100 tokens")
    print("  unchanged:", torch.equal(model(short).logits, before))
    print("1000 tokens, and 100 more to generate")
    output = model.generate(long, max_new_tokens=100, do_sample=False, return_dict_in_generate=True)
    print("  the plan stays with its cache:", request_plan(output).lengths.tolist())
    print("a loop of your own, planned for 2000 tokens")
    with planned(2000):
        cache = model(long).past_key_values
        for token in range(3):
            cache = model(torch.tensor([[token]]), past_key_values=cache).past_key_values
