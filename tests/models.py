"""Models with random weights as sources, and a small tokenizer, for tests that need no run."""

import json
from pathlib import Path

import torch
from torch import Tensor

from moe_lm.data.tokenizer_huggingface import HuggingFaceTokenizer
from moe_lm.model.decoder import CausalLM

CHARACTERS = " abcdefghijklmno"


class InMemory:
    """A `ModelSource` whose parameters are a model's."""

    def __init__(self, model: CausalLM, tokenizer_directory: Path | None = None):
        self.model, self.config, self.path = model, model.config, Path("in-memory")
        self.tokenizer_directory = tokenizer_directory

    def names(self) -> list[str]:
        return [name for name, _ in self.model.named_parameters()]

    def tensor(self, name: str) -> Tensor:
        return self.model.get_parameter(name).detach().clone()

    def parameters(self):
        return ((name, self.tensor(name)) for name in self.names())


def write_tokenizer(directory: Path, characters: str = CHARACTERS) -> HuggingFaceTokenizer:
    """A tokenizer whose ids are four marks and one for each character, as files that transformers reads."""
    marks = ["<unk>", "<s>", "</s>", "<pad>"]
    vocabulary = {text: token for token, text in enumerate([*marks, *characters])}
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False) | {"special": True}
    content = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [{"id": vocabulary[mark], "content": mark, **flags} for mark in marks[1:]],
        "normalizer": None,
        "pre_tokenizer": None,
        "post_processor": None,
        "decoder": {"type": "Fuse"},
        "model": {"type": "BPE", "vocab": vocabulary, "merges": [], "unk_token": "<unk>", "fuse_unk": True},
    }
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "tokenizer.json").write_text(json.dumps(content))
    names = dict(zip(("unk_token", "bos_token", "eos_token", "pad_token"), marks))
    configuration = {"tokenizer_class": "PreTrainedTokenizerFast", **names, "split_special_tokens": True}
    (directory / "tokenizer_config.json").write_text(json.dumps(configuration))
    return HuggingFaceTokenizer(directory)


def randomize(model: CausalLM, seed: int) -> CausalLM:
    """Norms too: weights of one would hide that one norm is another."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.normal_(1.0, 0.1, generator=generator)
    return model
