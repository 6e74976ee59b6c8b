"""Ask the bundled model for something it read four times further back than it was trained for.

Run it as ``python examples/read_further.py``; it needs no network.
"""

from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_rope_ext import assets, describe, patch_model, unpatch_model

tokenizer = AutoTokenizer.from_pretrained(assets.DIRECTORY)
model = AutoModelForCausalLM.from_pretrained(assets.DIRECTORY)  # trained at 512 tokens
text = assets.TEXT.read_text(encoding="utf-8")[:4000]
prompt = f"\nThe pass key is 48213.\n{text}\nThe pass key is "
inputs = tokenizer(prompt, return_tensors="pt")
print(f"{inputs.input_ids.shape[1]} tokens")


def answer() -> str:
    """Return the five tokens the model goes on with."""
    output = model.generate(**inputs, max_new_tokens=5, do_sample=False)
    return str(tokenizer.decode(output[0, -5:]))


print("unpatched:", answer())
patch_model(model, "yarn", factor=4)
print("yarn:     ", answer())
print(describe(model))
unpatch_model(model)  # bit for bit what it was
