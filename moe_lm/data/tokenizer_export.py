"""Writes a tokenizer for transformers, so that `AutoTokenizer.from_pretrained` gives sentencepiece's ids.

transformers' own conversion does not: it reads a literal "<s>" in a text as the control token, and puts a space in
front. So `tokenizer.json` is written here. A BPE merge list is not stored in a sentencepiece model, but follows from
it: a piece is made from any two pieces that concatenate to it, and the piece with the lower id (higher score) first.
A tokenizer by character is BPE without merges.
"""

import itertools
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moe_lm.data.tokenizer_files import MODEL_FILE, SPACE
from moe_lm.data.tokenizer_huggingface import write_chat_template
from moe_lm.errors import InputError
from moe_lm.files import write_atomically, write_json

if TYPE_CHECKING:  # which is built on this module
    from moe_lm.data.tokenizer_sentencepiece import SentencePieceTokenizer


def save_tokenizer_files(tokenizer: "SentencePieceTokenizer", directory: Path, model_max_length: int) -> None:
    """Writes tokenizer.model, tokenizer.json, tokenizer_config.json and special_tokens_map.json; where there is one,
    chat_template.jinja.

    Without a chat template, control strings are text wherever transformers reads them (`split_special_tokens`). With
    one they can not be, since `apply_chat_template` renders a text and reads its role marks back out of it; what keeps
    those inside a message apart there is `sanitize_control_tokens=True`. moe-lm itself needs neither.

    Args:
        tokenizer: The tokenizer to write.
        directory: Where to (made if missing).
        model_max_length: Longest sequence in tokens, which transformers warns beyond.

    Raises:
        InputError: The sentencepiece model is of a kind that cannot be written exactly.
    """
    directory.mkdir(parents=True, exist_ok=True)
    special_pieces = tokenizer.special_tokens
    write_atomically(directory / MODEL_FILE, tokenizer.model_bytes)
    write_atomically(directory / "tokenizer.json", json.dumps(tokenizer_json(tokenizer), ensure_ascii=False).encode())
    write_json(directory / "special_tokens_map.json", special_pieces)
    write_chat_template(directory, tokenizer.chat_template)
    write_json(
        directory / "tokenizer_config.json",
        {
            "tokenizer_class": "PreTrainedTokenizerFast",
            **special_pieces,
            "add_bos_token": True,
            "add_eos_token": False,
            # Without this, "<s>" in a document would become the control id.
            "split_special_tokens": tokenizer.chat_template is None,
            "clean_up_tokenization_spaces": False,
            "model_max_length": model_max_length,
        },
    )


def tokenizer_json(tokenizer: "SentencePieceTokenizer") -> dict[str, Any]:
    """The content of tokenizer.json: tokenizers' BPE with sentencepiece's merges.

    Raises:
        InputError: The sentencepiece model is of a kind that cannot be written exactly.
    """
    _check_exportable(tokenizer)
    bos = tokenizer.piece(tokenizer.bos_id)
    replace = {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}
    unreplace = {"type": "Replace", "pattern": {"String": SPACE}, "content": " "}
    decoders: list[dict[str, Any]] = [unreplace, {"type": "ByteFallback"}, {"type": "Fuse"}]
    normalizer: dict[str, Any] = replace
    if tokenizer.has_dummy_prefix:
        normalizer = {"type": "Sequence", "normalizers": [{"type": "Prepend", "prepend": SPACE}, replace]}
        decoders.append({"type": "Strip", "content": " ", "start": 1, "stop": 0})
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            {
                "id": token,
                "content": tokenizer.piece(token),
                "single_word": False,
                "lstrip": False,
                "rstrip": False,
                "normalized": False,
                "special": True,
            }
            for token in sorted(tokenizer.control_ids)
        ],
        "normalizer": normalizer,
        "pre_tokenizer": None,
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [{"SpecialToken": {"id": bos, "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
            "pair": [
                {"SpecialToken": {"id": bos, "type_id": 0}},
                {"Sequence": {"id": "A", "type_id": 0}},
                {"SpecialToken": {"id": bos, "type_id": 1}},
                {"Sequence": {"id": "B", "type_id": 1}},
            ],
            "special_tokens": {bos: {"id": bos, "ids": [tokenizer.bos_id], "tokens": [bos]}},
        },
        "decoder": {"type": "Sequence", "decoders": decoders},
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": tokenizer.special_tokens["unk_token"],
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": True,
            "byte_fallback": True,
            "ignore_merges": False,
            "vocab": {tokenizer.piece(token): token for token in range(tokenizer.vocab_size)},
            "merges": _merges(tokenizer),
        },
    }


def _merges(tokenizer: "SentencePieceTokenizer") -> list[list[str]]:
    """All pairs of pieces whose concatenation is a piece, by the id of the result."""
    ordinary = {tokenizer.piece(token): token for token in tokenizer.text_ids}
    merges = []
    for piece in ordinary:
        splits = ((piece[:cut], piece[cut:]) for cut in range(1, len(piece)))
        merges += [[left, right] for left, right in splits if left in ordinary and right in ordinary]
    return merges


def _check_exportable(tokenizer: "SentencePieceTokenizer") -> None:
    """Refuses models whose ids tokenizers' BPE would not reproduce: unigram, user-defined pieces, normalisation."""
    remedy = "use a BPE model with byte_fallback and identity normalisation, or let moe-lm train one."
    scores = [tokenizer.score(token) for token in tokenizer.text_ids]
    ranked = all(earlier > later for earlier, later in itertools.pairwise(scores))
    if not tokenizer.is_by_character and (not ranked or any(score != round(score) for score in scores)):
        raise InputError(
            f"tokenizer.path: this sentencepiece model is not plain BPE (or has pieces of its own); {remedy}"
        )
    if sum(tokenizer.is_byte(token) for token in range(tokenizer.vocab_size)) != 256:
        raise InputError(f"tokenizer.path: this sentencepiece model has no byte fallback; {remedy}")
    probe = "A  ﬁ ①\r\n\t x\u00a0"
    if tokenizer.decode(tokenizer.encode(probe)) != probe:
        raise InputError(f"tokenizer.path: this sentencepiece model changes the text it reads; {remedy}")
