"""A text, tokenizers of every kind trained on it, and a comparison small enough to run."""

from types import SimpleNamespace

import torch
from conftest import tiny_llama
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import nn
from transformers import PreTrainedTokenizerFast

from hf_rope_ext.evals.compare import Comparison
from hf_rope_ext.methods import NoScaling, Yarn

WORDS = "the cat sat on a mat and then some other animal came by to look at it . \n"
TEXT = " ".join(f"{WORDS}{number}" for number in range(400))


def byte_level():
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    return tokenizer, trainer


def unigram():
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    alphabet = sorted(set(TEXT + "0123456789Thepasky.\n"))
    return tokenizer, trainers.UnigramTrainer(
        vocab_size=200,
        special_tokens=["<s>", "<unk>"],
        unk_token="<unk>",
        initial_alphabet=alphabet,
    )


def word_piece():
    tokenizer = Tokenizer(models.WordPiece(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return tokenizer, trainers.WordPieceTrainer(
        vocab_size=300, special_tokens=["<s>", "<unk>"], initial_alphabet=list("0123456789")
    )


def characters():
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    alphabet = sorted(set(TEXT + "0123456789Thepasky.\n"))
    return tokenizer, trainers.BpeTrainer(
        vocab_size=2, special_tokens=["<s>", "<unk>"], initial_alphabet=alphabet
    )


def make_tokenizer(kind=byte_level):
    tokenizer, trainer = kind()
    trainer.show_progress = False
    corpus = [TEXT, *(f"\nThe pass key is {number:05d}.\n" for number in range(0, 99999, 997))]
    tokenizer.train_from_iterator(corpus, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>")


def wide_llama():
    return tiny_llama(vocab_size=512)


class Scripted(nn.Module):
    """Continues as the same words went on before, among the last tokens it sees."""

    def __init__(self, sees):
        super().__init__()
        self.sees = sees
        self.weight = nn.Parameter(torch.zeros(1))

    def forward(self, input_ids, use_cache=None, logits_to_keep=0):
        rows = [
            [
                self.next(tokens[: end + 1])
                for end in range(len(tokens) - logits_to_keep, len(tokens))
            ]
            for tokens in input_ids.tolist()
        ]
        return SimpleNamespace(logits=nn.functional.one_hot(torch.tensor(rows), 512).float())

    def generate(self, input_ids, attention_mask, generation_config):
        rows = [
            row[kept.bool()].tolist() for row, kept in zip(input_ids, attention_mask, strict=True)
        ]
        new = [[] for _ in rows]
        for number, row in enumerate(rows):
            for _ in range(generation_config.max_new_tokens):
                new[number].append(self.next(row + new[number]))
        return torch.cat((input_ids, torch.tensor(new)), dim=1)

    def next(self, tokens):
        """The token after the last place where the longest possible ending stood before."""
        visible = tokens[-self.sees :]
        best, found = 2, 0
        for start in range(len(visible) - 1):
            length = 0
            while (
                length < 30 and length <= start and visible[start - length] == visible[-1 - length]
            ):
                length += 1
            if length > best:
                best, found = length, visible[start + 1]
        return found


def small(tokenizer, **changes):
    settings = {
        "model": wide_llama(),
        "tokenizer": tokenizer,
        "text": TEXT,
        "methods": {"none": NoScaling(), "yarn": Yarn(8)},
        "lengths": (420, 600),
        "tasks": (
            "rope_passkey_ll:depths=[0,1]",
            "rope_add",
            "rope_short",
            "rope_longppl:windows=1:short=100",
        ),
        "windows": 2,
        "samples": 2,
    }
    return Comparison(**{**settings, **changes})
