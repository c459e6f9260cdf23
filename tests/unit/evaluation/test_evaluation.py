"""Bits per byte, compressors and sampling."""

import copy
import dataclasses
import gzip
import json
import lzma
import math
import sysconfig
from pathlib import Path

import pytest
import sentencepiece
import torch

from moe_lm.data.chat_template import DEFAULT_TEMPLATE, ChatFormat
from moe_lm.data.config import TooLong
from moe_lm.data.encode import encode, encode_conversations
from moe_lm.data.loader import validation_batches
from moe_lm.data.shards import ShardWriter, TokenShard
from moe_lm.data.tokenizer import load_tokenizer
from moe_lm.data.tokenizer_sentencepiece import train_tokenizer
from moe_lm.errors import RunError
from moe_lm.evaluation.bits_per_byte import evaluate
from moe_lm.evaluation.compressors import document_bytes, gzip_bits_per_byte, xz_bits_per_byte
from moe_lm.evaluation.generation import continuation, generate
from moe_lm.model.config import ModelConfig
from moe_lm.model.decoder import CausalLM
from moe_lm.model.initialization import initialize
from moe_lm.parallel.runtime import Runtime


@pytest.fixture(scope="module")
def held_out(tmp_path_factory):
    """Two documents, each a shard, their tokenizer, and a small model."""
    directory = tmp_path_factory.mktemp("held-out")
    source = (Path(sysconfig.get_path("stdlib")) / "textwrap.py").read_text(encoding="utf-8")
    texts = [source[:700], "kurz: äöü €\n" * 3]
    tokenizer = train_tokenizer([source], 400, directory)
    shards = []
    for name, text in zip("ab", texts, strict=True):
        writer = ShardWriter(directory, name, tokenizer.vocab_size)
        writer.add(encode(tokenizer, [text]), ["text"], len(text.encode()))
        shards.append(TokenShard(directory, name, writer.finish()))
    config = ModelConfig(
        vocab_size=400,
        hidden_size=32,
        intermediate_size=24,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        initializer_range=0.3,
    )
    model = CausalLM(config)
    initialize(model, 1)
    return model, shards, tokenizer, texts


def test_bits_per_byte_is_the_cost_of_every_token_over_the_bytes(held_out):
    """Catches nats for bits, characters for bytes, end marks left out, targets at row edges lost or counted twice:
    against each document by itself with full logits (rows longer than the documents), and any row length counts each
    target."""
    model, shards, tokenizer, texts = held_out
    bits = 0.0
    for text in texts:
        ids = torch.tensor([[tokenizer.bos_id, *tokenizer.encode(text), tokenizer.eos_id]])
        with torch.no_grad():
            probability = model.logits(model(ids[:, :-1]).hidden_BSD).double().log_softmax(-1)
        bits -= probability.gather(2, ids[:, 1:, None]).sum().item() / math.log(2)
    expected = bits / sum(len(text.encode()) for text in texts)
    runtime = Runtime("cpu")
    longest, num_targets = max(s.num_tokens for s in shards), sum(s.num_targets for s in shards)
    whole = evaluate(model, validation_batches(shards, 1, longest, pad_id=tokenizer.pad_id), shards, runtime)
    assert whole.bits_per_byte == pytest.approx(expected, rel=1e-5)
    assert whole.loss == pytest.approx(bits * math.log(2) / num_targets, rel=1e-5)
    for length, batch in ((7, 3), (64, 2)):
        rows = list(validation_batches(shards, batch, length, pad_id=tokenizer.pad_id))
        assert sum(int((b.labels >= 0).sum()) for b in rows) == num_targets
        nats = 0.0
        for b in rows:
            with torch.no_grad():
                logits = model.logits(model(b.input_ids, b.position_ids, b.document_ids).hidden_BSD).double()
            nats += torch.nn.functional.cross_entropy(logits.flatten(0, 1), b.labels.flatten(), reduction="sum").item()
        assert evaluate(model, rows, shards, runtime).loss == pytest.approx(nats / num_targets, rel=1e-5)


def test_a_part_of_the_rows_is_an_estimate_of_the_whole(held_out):
    """Catches an estimate that divides a part of the cost by all of the bytes, which would be far too low."""
    model, shards, tokenizer, _ = held_out
    runtime = Runtime("cpu")
    whole = evaluate(model, validation_batches(shards, 4, 16, pad_id=tokenizer.pad_id), shards, runtime)
    rows = list(validation_batches(shards, 4, 16, pad_id=tokenizer.pad_id, max_rows=6))
    part, targets = evaluate(model, rows, shards, runtime), torch.cat([batch.labels for batch in rows]) >= 0
    num_targets, num_bytes = (sum(figures) for figures in zip(*((s.num_targets, s.header.num_bytes) for s in shards)))
    assert 0 < targets.sum() < num_targets
    assert part.loss == pytest.approx(whole.loss, rel=0.25)
    assert part.bits_per_byte == pytest.approx(part.loss / math.log(2) * num_targets / num_bytes, rel=1e-9)


def test_rows_without_a_target_have_no_figure(held_out):
    """Catches a division by zero where all of an estimate's rows are a user's words."""
    model, shards, tokenizer, _ = held_out
    batch = next(iter(validation_batches(shards, 4, 16, pad_id=tokenizer.pad_id)))
    batch = dataclasses.replace(batch, labels=torch.full_like(batch.labels, -100))
    assert all(math.isnan(figure) for figure in evaluate(model, [batch], shards, Runtime("cpu")))


def test_compressors_see_the_documents_themselves(held_out):
    """Catches a comparison with other bytes than those that bits per byte are counted over, or a weaker setting."""
    _, shards, tokenizer, texts = held_out
    content = document_bytes(shards, tokenizer)
    assert content == "".join(texts).encode() and len(content) == sum(s.header.num_bytes for s in shards)
    big = content * 40
    header = 18  # of the gzip format
    assert gzip_bits_per_byte(big) == pytest.approx(8 * (len(gzip.compress(big, 9)) - header) / len(big))
    assert xz_bits_per_byte(big) == 8 * len(lzma.compress(big, preset=9)) / len(big)


def _sampled(model: CausalLM, tokens: int = 1, **options) -> list[int]:
    return generate(model, [[1, 7, 9]], tokens, **options)[0]


def test_sampling_follows_temperature_top_k_and_seed(held_out):
    """Catches an inverted temperature, a top-k that lets others through, and a seed that does not decide."""
    model, *_ = held_out
    with torch.no_grad():
        logits = model.logits(model(torch.tensor([[1, 7, 9]])).hidden_BSD[0, -1])
    best = int(logits.argmax())
    assert _sampled(model) == _sampled(model, temperature=1.0, top_k=1) == [best]
    assert all(_sampled(model, temperature=1e-40, seeds=[s]) == [best] for s in range(20))
    allowed = set(logits.topk(5).indices.tolist())
    drawn = [_sampled(model, temperature=1.0, top_k=5, seeds=[s])[0] for s in range(300)]
    assert set(drawn) <= allowed and len(set(drawn)) > 1
    share = drawn.count(best) / 300
    assert share == pytest.approx(logits.topk(5).values.softmax(0)[0].item(), abs=0.12)
    hot = [_sampled(model, temperature=3.0, top_k=5, seeds=[s])[0] for s in range(300)].count(best) / 300
    assert hot < share
    assert _sampled(model, 6, temperature=1.0, seeds=[3]) == _sampled(model, 6, temperature=1.0, seeds=[3])


def test_generation_ends_at_the_end_mark(held_out):
    """Catches an end mark that is printed, or a text that goes on behind it."""
    model, *_ = held_out
    first = _sampled(model, 8)
    assert len(first) == 8
    assert generate(model, [[1, 7, 9]], 8, end_ids=[first[3]]) == [first[: first.index(first[3])]]


def test_an_end_mark_can_be_generated_whatever_the_choices(held_out):
    """Catches an answer that can not end, for its end mark is none of the ids that a text may go on with."""
    model, *_ = held_out
    (best,) = _sampled(model)
    others = [token for token in range(400) if token != best]
    assert generate(model, [[1, 7, 9]], 4, end_ids=[best], choices=others) == [[]]


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_logits_that_are_not_finite_are_refused(held_out, value, temperature):
    """Catches a traceback of torch's sampling, and an empty text, of a model that has diverged."""
    model = copy.deepcopy(held_out[0])
    with torch.no_grad():
        model.model.norm.weight.fill_(value)
    with pytest.raises(RunError, match="logits are not finite"):
        _sampled(model, temperature=temperature, top_k=5)


def test_a_huge_temperature_is_an_even_choice(held_out):
    """Catches a traceback where what top-k left out is divided by infinity, and is then no number."""
    model, *_ = held_out
    with torch.no_grad():
        allowed = set(model.logits(model(torch.tensor([[1, 7, 9]])).hidden_BSD[0, -1]).topk(3).indices.tolist())
    assert {_sampled(model, temperature=1e300, top_k=3, seeds=[s])[0] for s in range(60)} == allowed
    assert len(_sampled(model, 4, temperature=1e300)) == 4


def test_a_continuation_keeps_its_first_space(tmp_path):
    """Catches words that grow together with the prompt's last: alone, ids are decoded as the beginning of a text."""
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["the value is not a name of the value"] * 50),
        model_prefix=str(tmp_path / "m"),
        model_type="bpe",
        vocab_size=300,
        byte_fallback=True,
        hard_vocab_limit=False,
        minloglevel=2,
    )
    tokenizer = load_tokenizer(tmp_path / "m.model")
    prompt, new = tokenizer.encode("the value"), tokenizer.encode("is not")
    assert tokenizer.decode(new) == "is not" and tokenizer.decode([*prompt, *new]) == "the value is not"
    assert continuation(tokenizer, prompt, new) == " is not"
    first, last = tokenizer.encode("é\u0301")[:-1], tokenizer.encode("é\u0301")[-1:]
    assert "\ufffd" in tokenizer.decode(first) and continuation(tokenizer, first, last) == tokenizer.decode(last)


def test_conversations_are_scored_on_what_the_assistant_says(held_out, tmp_path):
    """Catches prompts that count, answers cut off from their prompts by rows, and bytes that are not the answers':
    against each conversation by itself with full logits, whatever the row length."""
    model, _, tokenizer, _ = held_out
    questions = ["what is this?" * (1 + number % 3) for number in range(7)]
    chats = [
        json.dumps([{"role": "user", "content": text}, {"role": "assistant", "content": f"ä{text[:5]}"}])
        for text in questions
    ]
    encoded = encode_conversations(tokenizer, chats, ChatFormat(DEFAULT_TEMPLATE, 80, TooLong.error))
    assert encoded.num_bytes is not None and encoded.num_bytes.tolist() == [7] * 7 and encoded.spans is not None
    writer = ShardWriter(tmp_path, "chat", tokenizer.vocab_size)
    writer.add(encoded, ["chat"] * 7, int(encoded.num_bytes.sum()))
    shards = [TokenShard(tmp_path, "chat", writer.finish())]
    nats, targets = 0.0, 0
    ends = encoded.lengths.cumsum()
    for end, length, (first, last) in zip(ends, encoded.lengths, encoded.spans):
        ids = torch.from_numpy(encoded.tokens[end - length : end].astype("int64"))[None]
        with torch.no_grad():
            probability = model.logits(model(ids[:, :-1]).hidden_BSD).double().log_softmax(-1)
        cost = -probability.gather(2, ids[:, 1:, None])[0, first - (end - length) - 1 : last - (end - length) - 1]
        nats, targets = nats + cost.sum().item(), targets + len(cost)
    for row in (80, 200):
        figures = evaluate(model, validation_batches(shards, 2, row, pad_id=tokenizer.pad_id), shards, Runtime("cpu"))
        assert figures.loss == pytest.approx(nats / targets, rel=1e-5)
        assert figures.bits_per_byte == pytest.approx(nats / math.log(2) / 49, rel=1e-5)
