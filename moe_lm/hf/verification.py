"""Whether a directory in Hugging Face's format is the model that it is said to be: checks, in tiers, and their receipt.

Always, and in the memory of the largest parameter and layer: nothing that can run code, the configuration as
transformers reads it, every tensor bit for bit, the vocabulary, the tokenizer's ids, each layer against transformers'.
Where the model fits into memory, the whole of it. It is the gate that an export has to pass, and `moe-lm verify`.
"""

import contextlib
import dataclasses
import hashlib
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moe_lm.checkpoint.tensor_file import TensorKind
from moe_lm.errors import InputError
from moe_lm.files import sha256
from moe_lm.hf.configuration_parity import check_configuration, check_reading, their_config
from moe_lm.hf.files import StoredTensor, find_tensors, read_into, read_object
from moe_lm.hf.layout import is_derived, model_type, to_disk, to_hf_config
from moe_lm.hf.parity import check_layers, check_model
from moe_lm.hf.receipt import (
    FORMAT,
    LAYERS,
    MARK,
    RECEIPT,
    WHOLE,
    Check,
    Receipt,
    StoredDigest,
    VerificationError,
    files_of_export,
)
from moe_lm.hf.their_model import DiskModel
from moe_lm.hf.tokenizer_parity import TextTokenizer, check_tokenizer
from moe_lm.memory import available_memory
from moe_lm.model.accounting import count_parameters
from moe_lm.model.source import ModelSource

_READ = (".json", ".jinja", ".model", ".txt")
"""What readers of a model open beside its weights: configurations, templates, tokenizers and vocabularies."""

_CAN_RUN_CODE = re.compile(r".*\.(bin|pt|pth|pkl|pickle|joblib|ckpt|py|pyc|so)", re.IGNORECASE)


def verify_export(
    directory: Path, source: ModelSource, tokenizer: TextTokenizer, dtype: torch.dtype, whole: bool | None = None
) -> Receipt:
    """Compare a directory with the source that it was made from.

    Args:
        directory: In Hugging Face's format.
        source: What it shall hold.
        tokenizer: The source's.
        dtype: What the source's values were rounded to.
        whole: Whether to run the whole model; null means where it fits into half of the memory that is free.

    Raises:
        VerificationError: A check does not hold.
    """
    with _named("files"):
        checks = [check_files(directory)]
    with _named("configuration"):
        checks.append(check_configuration(directory, source.config, tokenizer))
    with _named("tensors"):
        stored = find_tensors(directory)
        compared, tensors = check_tensors(stored, source, dtype)
    checks += [compared, check_vocabulary(stored, tokenizer), check_tokenizer(directory, tokenizer)]
    receipt = _run(_on_disk(directory, stored), source, dtype, whole, checks)
    return dataclasses.replace(receipt, tensors=tensors, files=_file_digests(directory))


@contextlib.contextmanager
def _named(check: str) -> Iterator[None]:
    """What a reader refuses in the block is a finding of this check."""
    try:
        yield
    except InputError as error:
        raise VerificationError(check, str(error).rstrip(".")) from error


def verify_alone(
    directory: Path, source: ModelSource, tokenizer: TextTokenizer | None, whole: bool | None = None
) -> Receipt:
    """Look at a directory without what it was made from: does moe-lm read from it the model that transformers does.

    Where it has a receipt, its files and tensors are compared with those that the receipt was written for.

    Args:
        directory: In Hugging Face's format.
        source: The same directory, opened.
        tokenizer: The same directory's, if it has one.
        whole: As for `verify_export`.

    Raises:
        VerificationError: A check does not hold.
    """
    recorded = _read_receipt(directory)
    checks = [check_files(directory, recorded), check_reading(directory, source.config)]
    stored = find_tensors(directory)
    compared, tensors = check_digests(stored, recorded)
    checks.append(compared)
    if tokenizer is not None:
        checks += [check_vocabulary(stored, tokenizer), check_tokenizer(directory, tokenizer)]
    receipt = _run(_on_disk(directory, stored), source, torch.float32, whole, checks)
    return dataclasses.replace(receipt, tensors=tensors, files=_file_digests(directory))


def verify_native(source: ModelSource, whole: bool | None = None) -> Receipt:
    """Compare what moe-lm and transformers compute from a source's parameters, without writing anything.

    Args:
        source: The model.
        whole: As for `verify_export`.

    Raises:
        VerificationError: A check does not hold.
    """

    def read(prefix: str) -> dict[str, Tensor]:
        names = (name for name in source.names() if name.startswith(prefix))
        return dict(to_disk((name, source.tensor(name)) for name in names))

    from transformers import AutoConfig

    config = AutoConfig.for_model(model_type(source.config), **to_hf_config(source.config))
    return _run(DiskModel(config, read, None), source, torch.float32, whole, [])


def _run(
    theirs: DiskModel,
    source: ModelSource,
    dtype: torch.dtype,
    whole: bool | None,
    checks: list[Check],
) -> Receipt:
    """The checks that run the model, as far as memory reaches."""
    checks = [*checks, check_layers(theirs, source, dtype)]
    needed, free = 2 * 4 * count_parameters(source.config).total, available_memory()
    if whole is None:
        whole = needed <= free // 2
        why = (
            f"running it whole takes {needed / 1e9:,.3g} GB, and half of the {free / 1e9:,.3g} GB that are free may go"
        )
    else:
        why = f"whole_model={'true' if whole else 'false'} was given"
    if whole:
        checks.append(check_model(theirs, source, dtype))
    return Receipt(WHOLE if whole else LAYERS, why, checks)


def _on_disk(directory: Path, stored: Mapping[str, StoredTensor]) -> DiskModel:
    def read(prefix: str) -> dict[str, Tensor]:
        return {name: _read(name, stored) for name in stored if name.startswith(prefix) and not is_derived(name)}

    return DiskModel(their_config(directory), read, directory)


def _read(name: str, stored: Mapping[str, StoredTensor]) -> Tensor:
    kind = stored[name].kind
    tensor = torch.empty(kind.shape, dtype=kind.dtype)
    read_into({name: tensor}, stored)
    return tensor


def _read_receipt(directory: Path) -> dict[str, Any] | None:
    """The receipt of a directory; null where none was written."""
    if (directory / RECEIPT).exists():
        recorded = read_object(directory / RECEIPT)
        if (found := recorded.get("format")) != FORMAT:
            raise VerificationError("files", f"{RECEIPT} has format {found}, and this version reads {FORMAT} alone")
        return recorded
    if RECEIPT in files_of_export(directory):
        raise VerificationError("files", f"{RECEIPT} is missing, which {MARK} names")
    return None


def check_files(directory: Path, recorded: dict[str, Any] | None = None) -> Check:
    """Nothing in the directory, or below it, can run code when it is opened; what a reader opens beside the weights is
    what the receipt was written for, if one is given.
    """
    paths = sorted(path for path in directory.rglob("*") if not path.is_dir())
    for path in paths:
        name = path.relative_to(directory)
        if _CAN_RUN_CODE.fullmatch(path.name):
            raise VerificationError("files", f"{name} can run code when it is opened")
        if path.name.lower().endswith("config.json") and "auto_map" in read_object(path):
            raise VerificationError("files", f"{name} names code to run (auto_map)")
    finding = f"{len(paths)} files: no pickle, no code"
    if recorded is not None:
        _compare(_file_digests(directory), recorded, "files")
        finding += f"; those beside the weights each the one that {RECEIPT} was written for, by SHA-256"
    return Check("files", finding)


def _file_digests(directory: Path) -> dict[str, str]:
    """SHA-256 of the files that a reader of the model opens beside the weights, by their path in the directory."""
    paths = (path for path in directory.rglob("*") if path.suffix in _READ and path.is_file())
    named = {str(path.relative_to(directory)): path for path in sorted(paths)}
    return {name: sha256(path) for name, path in named.items() if name not in (RECEIPT, MARK) and name[0] != "."}


def _compare(found: Mapping[str, Any], recorded: dict[str, Any], kind: str) -> None:
    """Each of the kind is the one that the receipt says."""
    wanted = recorded.get(kind)
    if not isinstance(wanted, dict) or not wanted:
        raise VerificationError(kind, f"{RECEIPT} has no digests of {kind}")
    for name in sorted(wanted.keys() | found.keys()):
        if name not in found or name not in wanted:
            raise VerificationError(kind, f"{name} is {'missing' if name in wanted else f'not in {RECEIPT}'}")
        if wanted[name] != found[name]:
            raise VerificationError(kind, f"{name} is not the one that {RECEIPT} was written for (SHA-256 differs)")


def check_tensors(
    stored: Mapping[str, StoredTensor], source: ModelSource, dtype: torch.dtype
) -> tuple[Check, dict[str, StoredDigest]]:
    """Every tensor of the source is there once, rounded to the type and otherwise bit for bit, and nothing else is."""
    digests: dict[str, StoredDigest] = {}
    for name, tensor in to_disk(source.parameters()):
        if name not in stored:
            raise VerificationError("tensors", f"{name} is missing")
        expected = tensor.to(dtype).contiguous()
        if (kind := stored[name].kind) != (meant := TensorKind.of(expected)):
            raise VerificationError("tensors", f"{name} is {kind}, and {meant} is meant")
        found = _read(name, stored)
        if not torch.equal(_bytes(found), _bytes(expected)):
            wrong = (_bytes(found) != _bytes(expected)).view(-1, dtype.itemsize).any(dim=1).sum().item()
            raise VerificationError("tensors", f"{name} is not the source's in {wrong:,} of {found.numel():,} values")
        digests[name] = _digest(name, found)
    if unknown := sorted(stored.keys() - digests.keys()):
        raise VerificationError("tensors", f"{unknown[0]} is in no parameter of the source")
    files = len({where.path for where in stored.values()})
    said = str(dtype).removeprefix("torch.")
    return Check("tensors", f"{len(digests):,} in {files} file(s), each once, equal to the source's in {said}"), digests


def check_digests(
    stored: Mapping[str, StoredTensor], recorded: dict[str, Any] | None
) -> tuple[Check, dict[str, StoredDigest]]:
    """Every tensor has finite values, and is the one that the receipt was written for, if there is a receipt."""
    digests = {name: _digest(name, _read(name, stored)) for name in stored}
    if recorded is None:
        return Check("tensors", f"{len(digests):,}, all values finite; no {RECEIPT} to compare them with"), digests
    _compare({name: digest._asdict() for name, digest in digests.items()}, recorded, "tensors")
    return Check("tensors", f"{len(digests):,}, each the one that {RECEIPT} was written for, by SHA-256"), digests


def check_vocabulary(stored: Mapping[str, StoredTensor], tokenizer: TextTokenizer) -> Check:
    """The embedding and the head have a row for each of the tokenizer's ids."""
    names = [name for name in ("model.embed_tokens.weight", "lm_head.weight") if name in stored]
    rows = {name: stored[name].kind.shape[0] for name in names}
    for name, number in rows.items():
        if number < tokenizer.vocab_size:
            raise VerificationError(
                "vocabulary", f"{name} has {number:,} rows, and the tokenizer {tokenizer.vocab_size:,} ids"
            )
    spare = min(rows.values(), default=0) - tokenizer.vocab_size
    return Check("vocabulary", f"{tokenizer.vocab_size:,} ids, a row for each in {' and '.join(names)}, {spare} spare")


def _digest(name: str, tensor: Tensor) -> StoredDigest:
    if not torch.stack(tensor.aminmax()).isfinite().all():  # NaN is both; and no mask as large as the tensor is made
        raise VerificationError("tensors", f"{name} has values that are not finite")
    digest = hashlib.sha256(memoryview(_bytes(tensor).numpy().data)).hexdigest()
    return StoredDigest(str(tensor.dtype).removeprefix("torch."), list(tensor.shape), digest)


def _bytes(tensor: Tensor) -> Tensor:
    return tensor.flatten().view(torch.uint8)
