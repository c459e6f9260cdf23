"""Tokenizing, also beside the process that asks: a pool of processes that hold nothing but the tokenizer (not torch).

Processes rather than threads, because a training process has a lock on its interpreter that training itself needs. A
worker that dies (killed for memory, say) breaks its pool, and whoever waits for a result hears of it at once.
"""

import contextlib
import functools
import json
import os
import signal
import threading
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context, parent_process
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from moe_lm.data.chat_template import ChatFormat, Refusal, encode_conversation
from moe_lm.data.tokenizer import Tokenizer, load_tokenizer
from moe_lm.errors import InputError, RunError


class Encoded(NamedTuple):
    """Documents as tokens, each in its marks, end to end."""

    tokens: NDArray[np.uint16 | np.uint32]
    lengths: NDArray[np.int64]
    """Tokens of each document, marks included; 0 for a conversation that can not be trained on."""
    spans: NDArray[np.int64] | None = None
    """Of conversations, which tokens are targets: [begin, end) of each run of them, in order. Null means all."""
    num_bytes: NDArray[np.int64] | None = None
    """Of conversations, the bytes that the assistant says in each."""
    refusals: Mapping[int, Refusal] = {}
    """Why a conversation has no tokens, by its number."""


def encode(tokenizer: Tokenizer, texts: Sequence[str]) -> Encoded:
    """Tokenizes documents on this core and wraps each in `<s> … </s>`."""
    documents = tokenizer.encode_batch(texts)
    lengths = np.array([len(ids) + 2 for ids in documents], dtype=np.int64)
    tokens = np.empty(int(lengths.sum()), dtype=token_type(tokenizer.vocab_size))
    position = 0
    for ids, length in zip(documents, lengths.tolist()):
        tokens[position] = tokenizer.bos_id
        tokens[position + 1 : position + length - 1] = ids
        tokens[position + length - 1] = tokenizer.eos_id
        position += length
    return Encoded(tokens, lengths)


def encode_conversations(tokenizer: Tokenizer, texts: Sequence[str], form: ChatFormat) -> Encoded:
    """Renders and tokenizes conversations, JSON lists of messages, on this core."""
    ids: list[int] = []
    spans: list[tuple[int, int]] = []
    lengths, num_bytes = np.zeros((2, len(texts)), dtype=np.int64)
    refusals: dict[int, Refusal] = {}
    for number, text in enumerate(texts):
        made = encode_conversation(tokenizer, json.loads(text), form)
        if isinstance(made, Refusal):
            refusals[number] = made
            continue
        spans += [(len(ids) + begin, len(ids) + end) for begin, end in made.spans]
        ids += made.ids
        lengths[number], num_bytes[number] = len(made.ids), made.num_bytes
    tokens = np.array(ids, dtype=token_type(tokenizer.vocab_size))
    return Encoded(tokens, lengths, np.array(spans, dtype=np.int64).reshape(-1, 2), num_bytes, refusals)


def token_type(vocab_size: int) -> np.dtype:
    """The smallest type of a file that holds every id."""
    return np.dtype("<u2" if vocab_size <= 2**16 else "<u4")


def start_workers(workers: int) -> ProcessPoolExecutor | None:
    """Starts processes that tokenize; they load their tokenizer with their first texts. Null for none.

    Raises:
        RunError: The system starts no more processes.
    """
    if not workers:
        return None
    pool = ProcessPoolExecutor(workers, get_context("spawn"), _begin_worker)
    with _as_sentence():
        pool.submit(_nothing)  # starts the first
    return pool


@contextlib.contextmanager
def _as_sentence() -> Iterator[None]:
    """Says in one sentence why a pool takes no work."""
    try:
        yield
    except BrokenProcessPool as error:
        raise _worker_died() from error
    except OSError as error:
        raise RunError(
            f"data.workers: the system starts no more processes ({error.strerror or error}); start the same command "
            "again with fewer of them, or with data.workers=0, which tokenizes in the command's own."
        ) from error


def _worker_died() -> RunError:
    return RunError(
        "a tokenizing process (data.workers) died, perhaps for want of memory; start the same command again, with "
        "fewer data.workers if it happens again."
    )


class Encoder:
    """Tokenizes texts in worker processes, or in this one."""

    def __init__(self, tokenizer: Tokenizer, path: Path, workers: int, pool: ProcessPoolExecutor | None = None) -> None:
        """Starts the workers, unless a pool of them was started before.

        Args:
            tokenizer: The tokenizer.
            path: Where the workers load the same from.
            workers: How many; 0 tokenizes in the calling thread.
            pool: What `start_workers` gave; it is closed with this.
        """
        self._tokenizer = tokenizer
        self.fingerprint, self.vocab_size = tokenizer.fingerprint, tokenizer.vocab_size
        self._path = str(path)
        self._pool = pool if pool is not None else start_workers(workers)
        self._probe: Future[None] | None = None

    def submit(self, texts: Sequence[str], form: ChatFormat | None = None) -> "Future[Encoded]":
        """Asks for texts to be tokenized, or with a form conversations; give the future to `result`.

        Raises:
            RunError: A worker died, or can not be started.
        """
        if self._pool is not None:
            with _as_sentence():
                return self._pool.submit(_encode_in_worker, self._path, self.fingerprint, texts, form)
        future: Future[Encoded] = Future()
        future.set_result(_encode(self._tokenizer, texts, form))
        return future

    def result(self, future: "Future[Encoded]") -> Encoded:
        """Waits for a result.

        Raises:
            RunError: A worker died.
        """
        try:  # an OSError is the work's own here
            return future.result()
        except BrokenProcessPool as error:
            raise _worker_died() from error

    def check(self) -> None:
        """Notices a worker that died, also while no result is wanted of it.

        Raises:
            RunError: One did, or another can not be started.
        """
        if self._pool is not None and (self._probe is None or self._probe.done()):
            with _as_sentence():
                self._probe = self._pool.submit(_nothing)

    def close(self) -> None:
        """Ends the workers without waiting for work that nobody needs any more."""
        if self._pool is not None:
            self._pool.shutdown(wait=True, cancel_futures=True)


def _begin_worker() -> None:
    """Leaves Ctrl-C and requests to save to the parent, and ends with it however it ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _nothing() -> None:
    """Asked of a worker to learn whether the pool still stands."""


def _encode(tokenizer: Tokenizer, texts: Sequence[str], form: ChatFormat | None) -> Encoded:
    return encode(tokenizer, texts) if form is None else encode_conversations(tokenizer, texts, form)


def _encode_in_worker(path: str, fingerprint: str, texts: Sequence[str], form: ChatFormat | None) -> Encoded:
    return _encode(_worker_tokenizer(path, fingerprint), texts, form)


@functools.cache
def _worker_tokenizer(path: str, fingerprint: str) -> Tokenizer:
    tokenizer = load_tokenizer(Path(path))
    if tokenizer.fingerprint != fingerprint:
        raise InputError(f"tokenizer.path: {path} has changed while it was being used; start again.")
    return tokenizer
