"""Read somebody else's model: a Hugging Face directory, or Mistral's own files. Only safetensors, no code.

Every tensor is accounted for before any is read: what is missing, extra, or of another type or shape is an error that
names it. Parameters are then read one at a time, stacked experts straight into their stack, so that memory holds one
parameter and never the model.
"""

from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from moe_lm.checkpoint.tensor_file import TensorKind
from moe_lm.errors import InputError
from moe_lm.hf.files import (
    TYPES,
    StoredTensor,
    find_consolidated,
    find_tensors,
    has_consolidated,
    read_into,
    read_object,
)
from moe_lm.hf.layout import Layout, is_derived, layout_of, slots
from moe_lm.hf.model_configuration import load_config
from moe_lm.model.decoder import CausalLM


class HuggingFaceSource:
    """A model in a Hugging Face directory, or in Mistral's own layout; a `ModelSource` of the commands."""

    def __init__(self, path: Path, tokenizer_directory: Path | None = None):
        """Read the configuration and all headers; compare them.

        Args:
            path: The directory.
            tokenizer_directory: Where its tokenizer's files are, if there are any.

        Raises:
            InputError: The directory is of another architecture, or its tensors are not those of its configuration.
        """
        self.path, self.tokenizer_directory = path, tokenizer_directory
        self.config = load_config(path)
        consolidated = has_consolidated(path)
        self._stored = find_consolidated(path) if consolidated else find_tensors(path)
        self.layout = layout_of(self._stored, consolidated)
        self._check_size()
        self.on_disk: dict[str, list[str]] = {}
        """The tensors on disk that each parameter is made of."""
        self._kinds: dict[str, TensorKind] = {}
        self._match()

    @property
    def has_code(self) -> bool:
        """Whether the directory asks for Python of its own, which is never run."""
        config = self.path / "config.json"
        return config.exists() and "auto_map" in read_object(config)

    @property
    def ignored(self) -> list[str]:
        """Tensors on disk that belong to no parameter, and need not: a tied head's copy, derived values."""
        return sorted(self._stored.keys() - {disk for names in self.on_disk.values() for disk in names})

    def stored(self, disk: str) -> StoredTensor:
        """Where a tensor on disk is, and what."""
        return self._stored[disk]

    def kinds(self) -> dict[str, TensorKind]:
        """Type and shape of every parameter by native name, in the model's own order."""
        return dict(self._kinds)

    def names(self) -> list[str]:
        """Native names of all parameters, in the model's own order."""
        return list(self._kinds)

    def tensor(self, name: str) -> Tensor:
        """A whole parameter, on the CPU, in the type it is stored in."""
        kind = self._kinds[name]
        whole = torch.empty(kind.shape, dtype=kind.dtype)
        read_into({slot.name: slot.view for slot in slots(name, whole, self.layout, self.config)}, self._stored)
        return whole

    def parameters(self) -> Iterator[tuple[str, Tensor]]:
        """All parameters by name, read one at a time."""
        return ((name, self.tensor(name)) for name in self._kinds)

    def _check_size(self) -> None:
        """Refuse a configuration that asks for more layers or experts than there are tensors, before any is built."""
        config = self.config
        apart = config.is_mixture and self.layout in (Layout.per_expert, Layout.consolidated)
        for name, number in (("layers", config.num_hidden_layers), ("experts", config.num_experts if apart else 0)):
            if number > len(self._stored):
                raise InputError(
                    f"{self.path}: has fewer tensors than its configuration has {name}; bring its files back."
                )

    def _match(self) -> None:
        """Compare what the files hold with what the configuration asks for."""
        missing, wrong = [], []
        try:
            with torch.device("meta"):
                model = CausalLM(self.config)
        except (RuntimeError, TypeError, OverflowError) as error:  # beyond what a tensor's size is counted in
            raise InputError(f"{self.path}: no model has the sizes that its configuration asks for.") from error
        for name, parameter in model.named_parameters():
            pieces = slots(name, parameter, self.layout, self.config)
            self.on_disk[name] = [slot.name for slot in pieces]
            here = {slot.name: self._stored[slot.name].kind for slot in pieces if slot.name in self._stored}
            missing += [slot.name for slot in pieces if slot.name not in here]
            wrong += [
                f"{self._stored[slot.name].path}: {slot.name} has shape {here[slot.name].shape}, and the configuration "
                f"asks for {slot.shape}; take both from one model"
                for slot in pieces
                if slot.name in here and here[slot.name].shape != slot.shape
            ]
            wrong += _wrong_types(self._stored, list(here))
            if here:
                self._kinds[name] = TensorKind(next(iter(here.values())).dtype, list(parameter.shape))
        tied = {"lm_head.weight", "output.weight"} if self.config.tie_word_embeddings else set()
        extra = [name for name in self.ignored if name not in tied and not is_derived(name)]
        if extra and f"model.{extra[0]}" in missing and "lm_head.weight" not in self._stored:
            kind = read_object(self.path / "config.json")["model_type"].capitalize()
            raise InputError(
                f"{self.path}: holds the body of a model without its language-model head ({extra[0]} is what a whole "
                f"one names model.{extra[0]}); save it whole, as {kind}ForCausalLM rather than {kind}Model."
            )
        if extra:
            raise InputError(
                f"{self.path}: {len(extra)} tensors do not belong to the model of its configuration, the first is "
                f"{extra[0]}; it is of another architecture, or its files are mixed up."
            )
        if missing:
            raise InputError(
                f"{self.path}: {len(missing)} tensors are missing, the first is {missing[0]}; bring its files back."
            )
        if wrong:
            more = f" ({len(wrong)} tensors are wrong in all)" if len(wrong) > 1 else ""
            raise InputError(f"{wrong[0]}{more}.")
        for name in tied & self._stored.keys():
            self._check_copy(name)

    def _check_copy(self, head: str) -> None:
        """Refuse a tied model whose files hold another head than its embedding: transformers computes with both."""
        (embedding,) = self.on_disk["model.embed_tokens.weight"]
        kinds = [self._stored[name].kind for name in (embedding, head)]
        if kinds[0] == kinds[1]:
            values = {name: torch.empty(kinds[0].shape, dtype=kinds[0].dtype) for name in (embedding, head)}
            read_into(values, self._stored)
            if torch.equal(values[embedding].view(torch.uint8), values[head].view(torch.uint8)):
                return
        raise InputError(
            f"{self.path}: its configuration ties the head to the embedding, and {head} is another matrix than "
            f"{embedding}; set {'tied_embeddings' if head == 'output.weight' else 'tie_word_embeddings'} to false "
            "there, or take the head out of the files."
        )


def _wrong_types(stored: dict[str, StoredTensor], names: list[str]) -> list[str]:
    """Tensors of one parameter whose types are not those of weights, or differ."""
    types = [(name, stored[name].kind.dtype) for name in names]
    sentences = [
        f"{stored[name].path}: {name} is {dtype}; float32, bfloat16 and float16 are supported, and no quantised weights"
        for name, dtype in types
        if dtype not in TYPES
    ]
    sentences += [
        f"{stored[name].path}: {name} is {dtype}, and {types[0][0]} is {types[0][1]}; both belong to one parameter"
        for name, dtype in types[1:]
        if dtype != types[0][1]
    ]
    return sentences
