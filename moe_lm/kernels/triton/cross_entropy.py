"""Cross-entropy of a chunk of logits, whose gradient is written over them.

Letters: R rows of the chunk, V vocabulary.

A program reads its row twice: once for the maximum and the sum of exponentials together (Milakov and Gimelshein 2018,
"Online normalizer calculation for softmax"), and once for the gradient, mostly from cache.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from moe_lm.kernels.triton.launch import block, warps

_LARGEST_BLOCK = 8192


def cross_entropy(logits_RV: Tensor, labels_R: Tensor, gradients: bool, ignored: int) -> Tensor:
    """Sum of the losses in fp32; if wanted, the logits become their gradient, zero where the label is ignored.

    Args:
        logits_RV: contiguous and not empty.
        labels_R: int64; any but `ignored` that is outside the vocabulary makes the loss NaN, as in the native kernel.
        gradients: whether they are wanted.
        ignored: the label that counts for nothing.
    """
    R, V = logits_RV.shape
    losses_R = logits_RV.new_empty(R, dtype=torch.float32)
    values = min(block(V), _LARGEST_BLOCK)
    pointers = logits_RV, labels_R.contiguous(), losses_R
    _cross_entropy[(R,)](*pointers, V, ignored, GRADIENTS=gradients, BLOCK=values, num_warps=warps(values))
    return losses_R.sum()


@triton.jit
def _cross_entropy(logits_ptr, labels_ptr, losses_ptr, V, ignored, GRADIENTS: tl.constexpr, BLOCK: tl.constexpr):
    row, column = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK)
    label, logits_ptr = tl.load(labels_ptr + row), logits_ptr + row * V
    is_known = (label >= 0) & (label < V)
    # Read before any thread of this program can have written: reductions come in between.
    of_label = tl.load(logits_ptr + label, mask=is_known, other=float("nan")).to(tl.float32)
    largest, total = float("-inf"), 0.0
    for first in range(0, V, BLOCK):
        inside = first + column < V
        logits = tl.load(logits_ptr + first + column, mask=inside, other=float("-inf")).to(tl.float32)
        larger = tl.maximum(largest, tl.max(logits, axis=0))
        # Of tokens that are all ruled out so far the largest is minus infinity, and no difference from it is a number.
        reference = tl.where(larger == float("-inf"), 0.0, larger)
        total = total * tl.exp(largest - reference) + tl.sum(tl.exp(logits - reference), axis=0)
        largest = larger
    log_total, is_ignored = tl.log(total), label == ignored
    # Differences of logits first: of large ones the logarithm would be rounded away.
    tl.store(losses_ptr + row, tl.where(is_ignored, 0.0, log_total + (largest - of_label)))
    if GRADIENTS:
        for first in range(0, V, BLOCK):
            inside = first + column < V
            logits = tl.load(logits_ptr + first + column, mask=inside, other=float("-inf")).to(tl.float32)
            gradient = tl.exp((logits - largest) - log_total) - tl.where(first + column == label, 1.0, 0.0)
            gradient = tl.where(is_ignored, 0.0, gradient)
            tl.store(logits_ptr + first + column, gradient.to(logits_ptr.dtype.element_ty), mask=inside)
