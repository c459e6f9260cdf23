"""lm-evaluation-harness on an export, without a network. Skipped where it is not installed: pip install '.[eval]'."""

import json

import pytest
import torch

from moe_lm.hf.export import export
from moe_lm.model.config import ModelConfig
from moe_lm.model.decoder import CausalLM
from moe_lm.model.initialization import initialize
from tests.models import InMemory, write_tokenizer

lm_eval = pytest.importorskip("lm_eval")

TASK = """
task: which_letter
dataset_path: json
dataset_kwargs:
  data_files: {{test: {file}}}
test_split: test
output_type: multiple_choice
target_delimiter: ""
doc_to_text: "{{{{text}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: answer
metric_list:
  - metric: acc
"""


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """A small mixture with random weights, its tokenizer, and its export."""
    directory = tmp_path_factory.mktemp("lm_eval")
    shape = {"hidden_size": 16, "intermediate_size": 12, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = ModelConfig(**shape, vocab_size=20, num_key_value_heads=2, num_experts=4, initializer_range=0.5)
    model = CausalLM(config)
    initialize(model, seed=9)
    tokenizer = write_tokenizer(directory / "tokenizer")
    export(InMemory(model), tokenizer, directory / "hf", torch.float32, lambda receipt: "")
    return model, tokenizer, directory / "hf"


def test_the_harness_runs_a_task(exported, tmp_path, monkeypatch):
    """Catches an export that the harness can not load or feed, and figures that are not those of our model."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_DATASETS_OFFLINE", "1")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    model, tokenizer, directory = exported
    choices = [" a", " b", " c"]
    texts = ["abc abc", "o n m l", "a b a b", "hello", "kind", "bead"]
    best = [
        max(range(3), key=lambda i, text=text: _log_likelihood(model, tokenizer, text, choices[i])) for text in texts
    ]
    answers = [best[0], best[1], best[2], best[3], (best[4] + 1) % 3, (best[5] + 1) % 3]
    rows = [{"text": t, "choices": choices, "answer": a} for t, a in zip(texts, answers)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "which_letter.yaml").write_text(TASK.format(file=tmp_path / "rows.jsonl"))

    results = lm_eval.simple_evaluate(
        model="hf",
        model_args={"pretrained": str(directory), "dtype": "float32"},
        tasks=["which_letter"],
        task_manager=lm_eval.tasks.TaskManager(include_path=str(tmp_path), include_defaults=False),
        device="cpu",
        bootstrap_iters=0,
    )
    assert results["results"]["which_letter"]["acc,none"] == pytest.approx(4 / 6)
    for sample, text in zip(results["samples"]["which_letter"], texts):
        ours = [_log_likelihood(model, tokenizer, text, choice) for choice in choices]
        assert [float(answer[0][0]) for answer in sample["resps"]] == pytest.approx(ours, rel=1e-4)


@torch.no_grad()
def _log_likelihood(model: CausalLM, tokenizer, text: str, choice: str) -> float:
    """Σ log p of the choice's tokens after the text."""
    ids, new = tokenizer.encode(text), tokenizer.encode(choice)
    tokens = torch.tensor([[*ids, *new]])
    log_p = model.logits(model(tokens).hidden_BSD)[0].log_softmax(dim=-1)
    return sum(log_p[len(ids) + i - 1, token].item() for i, token in enumerate(new))
