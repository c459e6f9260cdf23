"""Text from a model: one prompt, a key-value cache, greedy or sampled."""

from collections.abc import Iterator, Sequence

import torch

from moe_lm.model.attention import KeyValueCache
from moe_lm.model.decoder import CausalLM


@torch.no_grad()
def generate(
    model: CausalLM,
    prompt_ids: list[int],
    max_new_tokens: int,
    end_id: int,
    temperature: float = 0.0,
    top_k: int | None = None,
    seed: int = 0,
    choices: Sequence[int] | None = None,
) -> Iterator[int]:
    """Yield new token ids until `end_id` (which is not yielded) or `max_new_tokens`.

    Args:
        model: a model on any device.
        prompt_ids: at least one id; normally begins with the document's begin mark.
        max_new_tokens: most tokens to make.
        end_id: id that ends the text.
        temperature: 0 takes the most probable token every time.
        top_k: sample among this many most probable tokens; null means all.
        seed: seed of the sampling.
        choices: ids that may be generated; null means all of the model's vocabulary.
    """
    weight = model.lm_head.weight
    cache = KeyValueCache(model.config, 1, len(prompt_ids) + max_new_tokens, weight.device, weight.dtype)
    generator = torch.Generator().manual_seed(seed)
    choice_C = torch.tensor(range(model.config.vocab_size) if choices is None else choices)
    new_ids = prompt_ids
    for _ in range(max_new_tokens):
        hidden_BSD = model(torch.tensor([new_ids], device=weight.device), cache=cache).hidden_BSD
        logits_C = model.logits(hidden_BSD[0, -1]).float().cpu().index_select(0, choice_C)
        token = int(choice_C[_choose(logits_C, temperature, top_k, generator)])
        if token == end_id:
            return
        yield token
        new_ids = [token]


def _choose(logits_C: torch.Tensor, temperature: float, top_k: int | None, generator: torch.Generator) -> int:
    if temperature < 1e-30:  # 0, or so little that fp32 would divide by it
        return int(logits_C.argmax())
    if top_k is not None and top_k < len(logits_C):
        logits_C = logits_C.masked_fill(logits_C < logits_C.topk(top_k).values[-1], float("-inf"))
    # The maximum goes first: a tiny temperature must not divide logits into infinities.
    scaled_C = (logits_C - logits_C.max()) / temperature
    return int(torch.multinomial(scaled_C.softmax(dim=-1), 1, generator=generator))
