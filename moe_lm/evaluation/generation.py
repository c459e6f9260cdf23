"""Text from a model: any number of prompts at once, a key-value cache, greedy or sampled.

Letters: B prompts, S length of the longest, D hidden, V vocabulary, C ids that may be generated.
"""

from collections.abc import Collection, Sequence

import torch
from torch import Tensor

from moe_lm.data.tokenizer import Tokenizer
from moe_lm.errors import RunError
from moe_lm.model.attention import KeyValueCache
from moe_lm.model.decoder import CausalLM
from moe_lm.model.decoding import decoding_step


@torch.inference_mode()
def generate(
    model: CausalLM,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    end_ids: Collection[int] = (),
    temperature: float = 0.0,
    top_k: int | None = None,
    seeds: Sequence[int] = (),
    choices: Sequence[int] | None = None,
) -> list[list[int]]:
    """New token ids of every prompt, until one of `end_ids` (which is not among them) or `max_new_tokens` of them.

    Args:
        model: a model on any device.
        prompts: at least one id each; normally beginning with the document's begin mark.
        max_new_tokens: most tokens to make of each.
        end_ids: ids that end a text.
        temperature: 0 takes the most probable token every time.
        top_k: sample among this many most probable tokens; null means all.
        seeds: what each prompt's sampling is seeded with; empty means 0, 1, 2 … A text does not depend on the others.
        choices: ids that may be generated besides `end_ids`; null means all of the model's vocabulary.

    Raises:
        RunError: The model's logits are not finite.
    """
    weight = model.lm_head.weight
    longest = max(map(len, prompts))
    padding_B = [longest - len(prompt) for prompt in prompts]
    rows = [[0] * padding + list(prompt) for padding, prompt in zip(padding_B, prompts)]
    cache = KeyValueCache(model.config, padding_B, longest + max_new_tokens, weight)
    generators = [torch.Generator().manual_seed(seed) for seed in seeds or range(len(prompts))]
    choice_C = None if choices is None else torch.tensor(sorted({*choices, *end_ids}))
    made: list[list[int]] = [[] for _ in prompts]
    unfinished = set(range(len(prompts)))
    step = decoding_step(model, cache)
    input_ids_BS = torch.tensor(rows, device=weight.device)
    for _ in range(max_new_tokens):
        logits_BC = step(input_ids_BS).cpu()
        if choice_C is not None:
            logits_BC = logits_BC.index_select(1, choice_C)
        index_B = _choose(logits_BC, temperature, top_k, generators)
        token_B = index_B if choice_C is None else choice_C.index_select(0, index_B)
        for number, token in enumerate(token_B.tolist()):
            if token in end_ids:
                unfinished.discard(number)
            if number in unfinished:
                made[number].append(token)
        if not unfinished:
            break
        input_ids_BS = token_B[:, None].to(weight.device)
    return made


def continuation(tokenizer: Tokenizer, prompt: Sequence[int], new: Sequence[int]) -> str:
    """The text that new ids add to a prompt's. By themselves they would be the beginning of a text, which many
    tokenizers decode without its first space.
    """
    before, whole = tokenizer.decode(prompt), tokenizer.decode([*prompt, *new])
    # A prompt that ends within a character is another text once the rest of it is there.
    return whole[len(before) :] if whole.startswith(before) else tokenizer.decode(new)


def _choose(logits_BC: Tensor, temperature: float, top_k: int | None, generators: Sequence[torch.Generator]) -> Tensor:
    if temperature < 1e-30:  # 0, or so little that fp32 would divide by it
        index_B = torch.from_numpy(logits_BC.numpy().argmax(axis=1))  # torch's own goes value by value
        _check_finite(logits_BC.gather(1, index_B[:, None]))
        return index_B
    if top_k is not None and top_k < logits_BC.shape[1]:
        least_B1 = logits_BC.topk(top_k).values[:, -1:]
        logits_BC = logits_BC.masked_fill(logits_BC < least_B1, float("-inf"))
    most_B1 = logits_BC.amax(dim=1, keepdim=True)
    _check_finite(most_B1)
    # The maximum goes first: a tiny temperature must not divide logits into infinities, nor a huge one be infinite.
    scaled_BC = (logits_BC - most_B1) / min(temperature, torch.finfo(torch.float32).max)
    probability_BC = scaled_BC.softmax(dim=1)
    return torch.cat([torch.multinomial(p, 1, generator=g) for p, g in zip(probability_BC, generators, strict=True)])


def _check_finite(most_B1: Tensor) -> None:
    """Refuse logits by their maximum, which is NaN where any of them is."""
    if not most_B1.isfinite().all():
        raise RunError(
            "the model's logits are not finite (NaN or infinite), so no text can be made: it has diverged in training, "
            "or its type is too narrow for it; take an earlier checkpoint, or precision=fp32."
        )
