"""`moe-lm generate`: continue a text, or answer a message."""

from pathlib import Path

import torch

from moe_lm.commands.config import GenerateConfig
from moe_lm.commands.model_source import open_model
from moe_lm.data.chat_template import encode_prompt
from moe_lm.errors import InputError
from moe_lm.evaluation.generation import generate
from moe_lm.parallel.runtime import Runtime
from moe_lm.training.config import Device


def run(config: GenerateConfig) -> int:
    """Print the prompt and its continuation, or in a chat the answer alone."""
    assert config.checkpoint is not None
    if config.device is Device.cuda and not torch.cuda.is_available():
        raise InputError("device=cuda: no CUDA device is visible here; use device=auto or cpu.")
    device: torch.device = Runtime(config.device.value).device
    model, tokenizer = open_model(Path(config.checkpoint), device)
    if config.chat:
        prompt_ids = encode_prompt(tokenizer, config.prompt)
    else:
        prompt_ids = [tokenizer.bos_id, *tokenizer.encode(config.prompt)]
    context = model.config.max_position_embeddings
    if len(prompt_ids) + config.max_new_tokens > context:
        raise InputError(
            f"max_new_tokens={config.max_new_tokens}: with the {len(prompt_ids)} tokens of the prompt that is more "
            f"than the model's context of {context} tokens; shorten one of them."
        )
    new_ids = generate(
        model,
        prompt_ids,
        config.max_new_tokens,
        tokenizer.eos_id,
        config.temperature,
        config.top_k,
        config.seed,
        tokenizer.generated_ids,
    )
    print(("" if config.chat else config.prompt) + tokenizer.decode(list(new_ids)))
    return 0
