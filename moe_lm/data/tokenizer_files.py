"""Names and words that the modules of both kinds of tokenizer share; it stands below them all."""

MODEL_FILE = "tokenizer.model"
"""A sentencepiece model, in a tokenizer's directory."""

SPACE = "\u2581"
"""How sentencepiece writes a space in its pieces."""

GOOD_COPY = "bring back a good copy, or fetch it again"
"""What to do about a tokenizer's file that can not be used."""
