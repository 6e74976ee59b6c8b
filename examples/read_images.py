"""Show a Qwen2.5-VL model more images than it was trained for, and scale by positions, not tokens.

Run it as ``python examples/read_images.py``; it needs Pillow and no network, since it makes a tiny
model that has not learned anything. With a checkpoint, replace `tiny` by::

    processor = AutoProcessor.from_pretrained(NAME)
    model = AutoModelForImageTextToText.from_pretrained(NAME)

and write the prompt with ``processor.apply_chat_template``; everything else stays as it is.
"""

import torch
from PIL import Image, ImageDraw
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    PreTrainedTokenizerFast,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2_5_VLProcessor,
    Qwen2VLImageProcessorPil,
)

from hf_rope_ext import describe, patch_model, request_length, unpatch_model

SPECIAL = ["<|endoftext|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"]


class Processor(Qwen2_5_VLProcessor):
    """The stock processor without its part for videos, which needs torchvision."""

    def __init__(self, image_processor: object, tokenizer: object) -> None:
        super().__init__(image_processor, tokenizer)


def tiny() -> tuple[Processor, Qwen2_5_VLForConditionalGeneration]:
    """Return a processor whose tokens are bytes, and a model as if trained at 128 positions."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    bytes_ = Tokenizer(models.BPE({one: number for number, one in enumerate(alphabet)}, merges=[]))
    bytes_.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bytes_.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bytes_, pad_token=SPECIAL[0], additional_special_tokens=SPECIAL[1:]
    )
    ids = dict(zip(SPECIAL, tokenizer.convert_tokens_to_ids(SPECIAL), strict=True))
    config = Qwen2_5_VLConfig(
        text_config={
            "vocab_size": len(tokenizer),
            "bos_token_id": None,
            "eos_token_id": None,
            "hidden_size": 64,
            "intermediate_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 128,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 1e4,
                "mrope_section": [2, 3, 3],
            },
        },
        vision_config={
            "depth": 2,
            "hidden_size": 64,
            "intermediate_size": 64,
            "num_heads": 4,
            "out_hidden_size": 64,
            "fullatt_block_indexes": [1],
        },
        image_token_id=ids["<|image_pad|>"],
        video_token_id=ids["<|video_pad|>"],
        vision_start_token_id=ids["<|vision_start|>"],
        vision_end_token_id=ids["<|vision_end|>"],
    )
    torch.manual_seed(0)
    model = Qwen2_5_VLForConditionalGeneration(config).eval()
    return Processor(Qwen2VLImageProcessorPil(), tokenizer), model


def draw(number: int) -> Image.Image:
    """Return a picture of as many disks as its number."""
    picture = Image.new("RGB", (224, 140), "white")
    pen = ImageDraw.Draw(picture)
    for disk in range(number):
        left, top = 8 + 30 * (disk % 7), 8 + 30 * (disk // 7)
        pen.ellipse((left, top, left + 22, top + 22), fill="navy")
    return picture


processor, model = tiny()
images = [draw(number) for number in range(1, 31)]
prompt = "<|vision_start|><|image_pad|><|vision_end|>" * len(images) + "Which shows 12 disks?"
inputs = processor(text=[prompt], images=images, return_tensors="pt")

found = request_length(model, **inputs, max_new_tokens=8)
print(found)
print(f"by tokens it would have been factor {found.tokens / found.trained:g}")

with torch.no_grad():
    before = model(**inputs).logits
# or factor=4, or by axis, of which a long video may need t alone: {"t": 4, "h": 1, "w": 1}
patch_model(model, "yarn", factor=found.factors)
print(describe(model))
output = model.generate(**inputs, max_new_tokens=8, do_sample=False)  # with a cache, as always
print("answer:", processor.tokenizer.decode(output[0, inputs["input_ids"].shape[1] :]))

unpatch_model(model)
with torch.no_grad():
    print("as it was:", torch.equal(model(**inputs).logits, before))
