"""Rows of packed documents against each document run alone, through the real batches and every attention backend."""

import numpy as np
import pytest
import torch

from moe_lm.data.batch import make_batch
from moe_lm.data.config import Packing
from moe_lm.data.encode import encode
from moe_lm.data.rows import RowSet
from moe_lm.data.shards import TokenArray
from moe_lm.model import attention as attention_module
from moe_lm.model.config import ModelConfig, ModelFamily
from moe_lm.model.decoder import CausalLM
from moe_lm.model.initialization import initialize
from tests.unit.data.conftest import ByteTokenizer

LENGTH = 96
BACKENDS = [("cpu", "reference"), ("cpu", "sdpa"), ("cpu", "cpu"), ("cuda", "sdpa")]


@pytest.fixture(scope="module")
def array() -> TokenArray:
    """Documents that are shorter than a row, as long, and longer."""
    texts = ["word " * count for count in (1, 7, 3, 30, 12, 2, 19, 5, 1, 18)] + ["", "x" * (LENGTH - 1)]
    encoded = encode(ByteTokenizer(), texts)
    starts = np.cumsum(encoded.lengths) - encoded.lengths
    return TokenArray(encoded.tokens, starts, np.zeros(len(starts), dtype=np.uint16), ["all"])


@pytest.mark.parametrize("family", list(ModelFamily))
@pytest.mark.parametrize("packing", list(Packing))
@pytest.mark.parametrize(("device", "backend"), BACKENDS)
def test_packed_documents_have_the_logits_of_documents_alone(array, family, packing, device, backend, monkeypatch):
    """Catches attention across documents, positions that do not restart, and a router that sees its neighbours: within
    1e-5 of each piece of a document run alone, in fp32."""
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    original = attention_module.attention
    monkeypatch.setattr(attention_module, "attention", lambda *a: original(*a, backend=backend))
    config = ModelConfig(
        family=family,
        vocab_size=ByteTokenizer.vocab_size,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.1,
    )
    model = CausalLM(config)
    initialize(model, 0)
    model.to(device)
    row_set = RowSet([array], LENGTH, packing)
    rows = np.arange(row_set.num_rows)
    batch = make_batch(row_set.pieces(rows, rows), len(rows), LENGTH, pad_id=ByteTokenizer.pad_id).to(device)
    compared = 0
    with torch.no_grad():
        output = model(batch.input_ids, batch.position_ids, batch.document_ids, batch.routing_mask)
        logits_BSV = model.logits(output.hidden_BSD)
        for row in range(len(rows)):
            for document in range(1, int(batch.document_ids[row].max()) + 1):
                own = batch.document_ids[row] == document
                alone = model.logits(model(batch.input_ids[row][own][None]).hidden_BSD)[0]
                torch.testing.assert_close(logits_BSV[row][own], alone, atol=1e-5, rtol=0)
                compared += int(own.sum())
    assert (
        compared
        == int(batch.routing_mask.sum())
        == len(array.tokens) - (1 if packing is Packing.sequential else array.num_documents)
    )
