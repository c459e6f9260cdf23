"""Parameters and floating-point operations of a configuration, as formulas: nothing is built to count them."""

import dataclasses

from moe_lm.model.config import ModelConfig, Recompute


@dataclasses.dataclass(frozen=True)
class ParameterCount:
    """Numbers of parameters."""

    total: int
    """All of the model."""
    active: int
    """Those that one token uses: all but the experts it is not sent to."""
    embedding: int
    """The input embedding, a table look-up without arithmetic; 0 when it is tied to the output head."""


def count_parameters(config: ModelConfig) -> ParameterCount:
    """Count the parameters of a model, exactly."""
    hidden, size_of_head = config.hidden_size, config.width_of_head
    attention = 2 * hidden * size_of_head * (config.num_attention_heads + config.num_key_value_heads)
    expert = 3 * hidden * config.intermediate_size
    experts, routed = (config.num_experts, config.num_experts_per_tok) if config.is_mixture else (1, 1)
    gate = config.num_experts * hidden if config.is_mixture else 0
    table = config.vocab_size * hidden
    outside = hidden + table * (1 if config.tie_word_embeddings else 2)
    shared_by_layer = attention + gate + 2 * hidden
    return ParameterCount(
        total=outside + config.num_hidden_layers * (shared_by_layer + experts * expert),
        active=outside + config.num_hidden_layers * (shared_by_layer + routed * expert),
        embedding=0 if config.tie_word_embeddings else table,
    )


def training_state_bytes(config: ModelConfig, moments: int, compute_bytes: int) -> int:
    """What training holds of a model: fp32 weights, gradients and moments, and a compute copy; bytes.

    Gradients of a step's only micro-batch are held in bf16 where the update reads them so (`ComputeModel`).

    Args:
        config: The model.
        moments: Numbers per parameter that the optimizer keeps.
        compute_bytes: Size of a number of the compute copy; 4 means that there is none.
    """
    copy = compute_bytes if compute_bytes < 4 else 0
    return (4 * (2 + moments) + copy) * count_parameters(config).total


def activation_bytes(
    config: ModelConfig,
    tokens: int,
    recompute: Recompute,
    compute_bytes: int,
    probabilities: int = 0,
    masked_keys: int = 0,
    attention_again: bool = False,
) -> int:
    """What the layers keep of one micro-batch from its forward to its backward pass, and what one layer adds to that
    while it is computed again; bytes.

    What each operator keeps is its inputs: of a layer the residual stream and its norm, twice; q, k, v and the
    attention's output; the router's input in fp32; and of every expert row its gate-up product. (A dense block keeps
    both factors and the product of its gate as well.) Not counted: rows that came from other processes under expert
    parallelism, and what `selective` keeps on a GPU of experts' outputs row by row.

    Args:
        config: The model.
        tokens: Of the micro-batch.
        recompute: The mode of activation checkpointing.
        compute_bytes: Size of a number that is computed with.
        probabilities: Attention probabilities that are kept per token and head; 0 for fused attention.
        masked_keys: Keys of a document mask, where torch's fused attention has one: each layer then keeps a copy of it,
            and keys and values copied for each of their query heads.
        attention_again: Whether `selective` computes attention again, as it does without one of torch's fused kernels.
    """
    hidden, inner = config.hidden_size, config.intermediate_size
    query = config.num_attention_heads * config.width_of_head
    projections = query + 2 * config.num_key_value_heads * config.width_of_head
    attended = 3 * query + masked_keys if masked_keys else projections + config.num_attention_heads * probabilities
    attention = 2 * hidden + attended + query
    if config.is_mixture:
        products = config.num_experts_per_tok * 2 * inner
        block = 2 * hidden + products
    else:
        products, block = 2 * inner, 2 * hidden + 4 * inner
    router = 4 * hidden if config.is_mixture and compute_bytes < 4 else 0
    layer = compute_bytes * (attention + block) + router
    kept = {
        Recompute.none: layer,
        Recompute.selective: compute_bytes * (3 * hidden + projections + products + (0 if attention_again else query)),
        Recompute.full: compute_bytes * hidden,
    }[recompute]
    again = {
        Recompute.none: 0,
        Recompute.selective: layer - compute_bytes * products,  # which are there already
        Recompute.full: layer,
    }[recompute]
    return tokens * (config.num_hidden_layers * kept + again)


def training_flops_per_token(config: ModelConfig, sequence_length: int) -> int:
    """Forward and backward operations per token: 6 · active parameters but the look-up + 6 · L · S · N · H for
    attention.

    The attention term is half of the full square, since attention is causal (PaLM, Chowdhery et al. 2022, appendix B,
    halved). Recomputed activations do not count: this is the work asked for, not the work done.
    """
    count = count_parameters(config)
    attention = config.num_hidden_layers * sequence_length * config.num_attention_heads * config.width_of_head
    return 6 * (count.active - count.embedding) + 6 * attention
