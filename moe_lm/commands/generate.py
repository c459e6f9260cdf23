"""`moe-lm generate`: continue texts, or answer messages."""

import json
from pathlib import Path

import torch

from moe_lm.commands.config import GenerateConfig
from moe_lm.commands.model_source import open_model
from moe_lm.data.chat_template import encode_prompt
from moe_lm.data.tokenizer import Tokenizer
from moe_lm.errors import InputError
from moe_lm.evaluation.generation import continuation, generate
from moe_lm.model.config import ModelConfig
from moe_lm.parallel.runtime import Runtime
from moe_lm.training.config import Device
from moe_lm.training.precision import compute_dtype


def run(config: GenerateConfig) -> int:
    """Print the prompt and its continuation, or in a chat the answer alone; of many prompts JSON lines."""
    assert config.checkpoint is not None
    if config.device is Device.cuda and not torch.cuda.is_available():
        raise InputError("device=cuda: no CUDA device is visible here; use device=auto or cpu.")
    prompts = (
        [config.prompt] if config.prompts is None else read_prompts(Path(config.prompts).expanduser(), config.chat)
    )
    device: torch.device = Runtime(config.device.value).device
    model, tokenizer = open_model(Path(config.checkpoint).expanduser(), device, compute_dtype(config.precision, device))
    encoded = [_encode(number, prompt, tokenizer, config, model.config) for number, prompt in enumerate(prompts, 1)]
    # Prompts of like lengths together, so that little is padding; printed is in the file's order.
    order = sorted(range(len(prompts)), key=lambda number: len(encoded[number]))
    completions: dict[int, str] = {}
    for start in range(0, len(order), config.batch_size):
        numbers = order[start : start + config.batch_size]
        made = generate(
            model,
            [encoded[number] for number in numbers],
            config.max_new_tokens,
            tokenizer.end_ids,
            config.temperature,
            config.top_k,
            [config.seed + number for number in numbers],
            tokenizer.generated_ids,
        )
        for number, ids in zip(numbers, made):
            # An answer is a text of its own, in a chat.
            completions[number] = (
                tokenizer.decode(ids) if config.chat else continuation(tokenizer, encoded[number], ids)
            )
    for number, prompt in enumerate(prompts):
        if config.prompts is not None:
            print(json.dumps({"prompt": prompt, "completion": completions[number]}, ensure_ascii=False))
        else:
            print(("" if config.chat else prompt) + completions[number])
    return 0


def read_prompts(path: Path, chat: bool = False) -> list[str]:
    """The prompts of a file, in a chat the user's messages; blank lines are passed over.

    Raises:
        InputError: It can not be read, a line is no JSON string or an empty message, or there is none.
    """
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else f"it is no UTF-8 text, see byte {error.start + 1}"
        raise InputError(
            f"prompts={path}: can not be read ({reason}); give a file of JSON strings, one per line."
        ) from error
    prompts = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            prompt = json.loads(line)
        except (ValueError, RecursionError):
            prompt = None
        if not isinstance(prompt, str) or any("\ud800" <= character <= "\udfff" for character in prompt):
            raise InputError(f'prompts={path}: line {number} is no JSON string, such as "import os".')
        if chat and not prompt.strip():
            raise InputError(f"prompts={path}: line {number} is an empty message; with chat=true give the user's.")
        prompts.append(prompt)
    if not prompts:
        raise InputError(f"prompts={path}: holds no prompt; give a file of JSON strings, one per line.")
    return prompts


def _encode(number: int, prompt: str, tokenizer: Tokenizer, config: GenerateConfig, model: ModelConfig) -> list[int]:
    prompt_ids = encode_prompt(tokenizer, prompt) if config.chat else [tokenizer.bos_id, *tokenizer.encode(prompt)]
    context = model.max_position_embeddings
    if len(prompt_ids) + config.max_new_tokens > context:
        which = "the prompt" if config.prompts is None else f"prompt {number} of {config.prompts}"
        raise InputError(
            f"max_new_tokens={config.max_new_tokens}: with the {len(prompt_ids)} tokens of {which} that is more "
            f"than the model's context of {context} tokens; ask for fewer, or shorten the prompt."
        )
    return prompt_ids
