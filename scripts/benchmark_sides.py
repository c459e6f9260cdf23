"""One side of `benchmark.py`: a process that trains steps when it is told to, and says what they took.

A line of standard input has two numbers, of steps before the clock starts and of those that are timed; standard output
gets a JSON object for each line, and one at the beginning.
Every side trains the same weights on the same batches, in their order, with the same loss (that of transformers, the
balancing loss with it) and the same rule (AdamW, its fused kernel, no decay of norms, clipped to 1).
"""

import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from moe_lm.config import load
from moe_lm.data.batch import IGNORED, Batch
from moe_lm.kernels.allocator import give_back_freed_memory, keep_freed_memory
from moe_lm.model.config import ModelConfig, Recompute
from moe_lm.model.initialization import initial_value
from moe_lm.model.router import Router
from moe_lm.parallel.layout import Layout
from moe_lm.parallel.parallelize import parallelize
from moe_lm.parallel.runtime import Runtime
from moe_lm.training.config import OptimizerConfig, Precision
from moe_lm.training.feed import GlobalBatch
from moe_lm.training.machine import peak_memory
from moe_lm.training.optimizer import Optimizer
from moe_lm.training.precision import ComputeModel, compute_dtype
from moe_lm.training.state import initial_load
from moe_lm.training.step import train_step

RULE = OptimizerConfig(learning_rate=1e-3)

Between = Callable[[float | None], None]
"""To be called before every step, with the loss of the one before."""


class Conductor:
    """Lets a training loop run as many steps as standard input asks for, then waits."""

    def __init__(self, device: torch.device):
        self._device, self._before = device, peak_memory(device)
        self._left, self._timed, self._begin = 0, 0, 0.0

    def between_steps(self, loss: float | None = None) -> None:
        """Called before each step: returns when it may run, ends the process when there is nothing more to do."""
        if self._left:
            self._left -= 1
            if self._left == self._timed:  # the first are not timed
                self._begin = self._now()
            if self._left:
                return
        _say({"seconds": self._now() - self._begin, "loss": loss, "memory": peak_memory(self._device) - self._before})
        give_back_freed_memory()  # the machine does not hold what all sides have had at their peaks
        line = sys.stdin.readline()
        if not line:
            sys.exit(0)
        warm, self._timed = (int(count) for count in line.split())
        self._left, self._begin = warm + self._timed, self._now()

    def _now(self) -> float:
        if self._device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()


@torch.no_grad()
def initialize_alike(module: Any, config: ModelConfig) -> None:
    """The same weights for every side, drawn in fp32 where the model is: a CPU takes a minute for 5 B of them."""
    for name, parameter in module.named_parameters():
        parameter.copy_(initial_value(config, 0, name, parameter.shape, parameter.device, parameter.dtype))


def ours(
    model: ModelConfig,
    batches: list[Tensor],
    precision: Precision,
    recompute: Recompute,
    accumulation: int,
    device: torch.device,
    between: Between,
) -> None:
    """This trainer's own step, as `moe-lm pretrain` runs it."""
    runtime = Runtime(device.type)
    dtype = compute_dtype(precision, device)
    parallel = parallelize(model, Layout(), None, 0, device, dtype)
    initialize_alike(parallel.module, model)
    parallel.module.model.recompute = recompute
    compute = ComputeModel(parallel, dtype)
    optimizer = Optimizer(parallel.shards, RULE)
    load_LE = initial_load(model).to(device)
    loss: float | None = None
    for input_BS in _forever(batches):
        between(loss)
        batch = _our_batch(input_BS)
        targets, parts = int((batch.labels != IGNORED).sum()), batch.split(len(input_BS) // accumulation)
        result = train_step(
            compute, optimizer, runtime, GlobalBatch(parts, targets, input_BS.numel(), [], {}), load_LE, 1.0
        )
        loss = result.cross_entropy + model.router_aux_loss_coef * result.load_balancing


def _our_batch(input_BS: Tensor) -> Batch:
    labels_BS = torch.cat((input_BS[:, 1:], torch.full_like(input_BS[:, :1], IGNORED)), dim=1)
    position_BS = torch.arange(input_BS.shape[1]).expand_as(input_BS)
    ones = torch.ones_like(input_BS)
    return Batch(input_BS, labels_BS, position_BS, None, ones.bool(), torch.zeros_like(ones))


def theirs(
    model: ModelConfig,
    batches: list[Tensor],
    experts: str,
    precision: str,
    trainer: bool,
    recompute: Recompute,
    accumulation: int,
    device: torch.device,
    between: Between,
) -> None:
    """Transformers' Mixtral under its own Trainer, or under the loop that one writes by hand."""
    module = their_model(model, experts, device, torch.bfloat16 if precision == "bf16-held" else torch.float32)
    if precision == "bf16-autocast":  # its experts are left in fp32: who takes autocast, takes TF32 where there is any
        torch.set_float32_matmul_precision("high")
    if recompute is not Recompute.none:
        module.gradient_checkpointing_enable()
    if trainer:
        _their_trainer(module, batches, precision, between)
    else:
        _bare_loop(module, batches, precision, accumulation, between)


def their_model(config: ModelConfig, experts: str, device: torch.device, dtype: torch.dtype = torch.float32) -> Any:
    """Transformers' Mixtral with the weights that our side begins with, made in its type as `from_pretrained` does:
    a cast of the whole afterwards would round the rotations' frequencies.
    """
    from transformers import AutoModelForCausalLM, MixtralConfig

    from moe_lm.hf.layout import to_hf_config

    hf_config = MixtralConfig(**to_hf_config(config), output_router_logits=True, use_cache=False)
    hf_config._experts_implementation = experts
    with device:
        module = AutoModelForCausalLM.from_config(hf_config, experts_implementation=experts, dtype=dtype)
    initialize_alike(module, config)
    return module.train()


def _bare_loop(module: Any, batches: list[Tensor], precision: str, accumulation: int, between: Between) -> None:
    matrices, norms = ([p for p in module.parameters() if (p.dim() > 1) == wanted] for wanted in (True, False))
    groups = [{"params": matrices, "weight_decay": RULE.weight_decay}, {"params": norms, "weight_decay": 0.0}]
    rule = torch.optim.AdamW(groups, lr=RULE.learning_rate, betas=(RULE.beta1, RULE.beta2), fused=True)
    loss: float | None = None
    for input_BS in _forever(batches):
        between(loss)
        losses = []
        for part_BS in input_BS.to(module.device).chunk(accumulation):
            with torch.autocast(module.device.type, torch.bfloat16, enabled=precision == "bf16-autocast"):
                output = module(input_ids=part_BS, labels=part_BS)
            (output.loss / accumulation).backward()
            losses.append(output.loss.detach())
        torch.nn.utils.clip_grad_norm_(module.parameters(), RULE.max_grad_norm)
        rule.step()
        rule.zero_grad()
        loss = float(torch.stack(losses).mean())


def _their_trainer(module: Any, batches: list[Tensor], precision: str, between: Between) -> None:
    import tempfile

    from transformers import Trainer, TrainerCallback, TrainingArguments

    losses: list[Tensor] = []

    class Watched(Trainer):  # type: ignore[misc]
        def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
            loss = super().compute_loss(*args, **kwargs)
            losses.append(loss.detach())
            return loss

    class Steps(TrainerCallback):
        def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
            between(float(losses.pop()) if losses else None)

    rows = [{"input_ids": row, "labels": row} for batch in batches for row in batch]
    with tempfile.TemporaryDirectory() as directory:
        arguments = TrainingArguments(
            directory,
            per_device_train_batch_size=len(batches[0]),
            max_steps=10**6,
            learning_rate=RULE.learning_rate,
            adam_beta2=RULE.beta2,
            weight_decay=RULE.weight_decay,
            optim="adamw_torch_fused",
            bf16=precision == "bf16-autocast",
            use_cpu=module.device.type == "cpu",
            save_strategy="no",
            train_sampling_strategy="sequential",
            report_to=[],
            disable_tqdm=True,
        )
        Watched(module, arguments, train_dataset=rows, callbacks=[Steps()]).train()


def _forever(batches: list[Tensor]) -> Iterator[Tensor]:
    while True:
        yield from batches


def balance_by_force() -> None:
    """Let token t go to experts t·K … t·K + K − 1 (mod E), with its own router's weights for them, on every side."""
    from transformers.models.mixtral.modeling_mixtral import MixtralTopKRouter

    def choose(probability_TE: Tensor, k: int) -> tuple[Tensor, Tensor]:
        T, E = probability_TE.shape
        expert_TK = torch.arange(T * k).view(T, k) % E
        return probability_TE.gather(1, expert_TK), expert_TK

    def their_forward(self: Any, hidden: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        logits_TE = torch.nn.functional.linear(hidden.view(-1, self.hidden_dim), self.weight)
        top_TK, expert_TK = choose(logits_TE.float().softmax(-1), self.top_k)
        return logits_TE, top_TK / top_TK.sum(-1, keepdim=True), expert_TK

    Router.choose = lambda self, probability_TE: choose(probability_TE, self.top_k)  # type: ignore[method-assign]
    MixtralTopKRouter.forward = their_forward


def _say(message: dict[str, Any]) -> None:
    print(json.dumps(message), file=OUTPUT, flush=True)


if __name__ == "__main__":
    import torch._dynamo  # counted as import, for every side: any optimizer of torch's imports it
    import transformers  # noqa: F401 -- likewise

    OUTPUT = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print, those in C as well, is not ours
    side: dict[str, Any] = json.loads(sys.argv[1])
    if side["trainer"]:
        from transformers import Trainer  # noqa: F401 -- likewise
    if side["tuned_allocator"]:
        keep_freed_memory()
    if side["balanced"]:
        balance_by_force()
    model_config = load("pretrain", side["options"]).model
    data = list(load_file(Path(side["batches"]))["input_ids"].long())
    where, mode = torch.device(side["device"]), Recompute(side["recompute"])
    between_steps = Conductor(where).between_steps
    how = mode, side["accumulation"], where, between_steps
    if side["experts"] is None:
        ours(model_config, data, Precision(side["precision"]), *how)
    else:
        theirs(model_config, data, side["experts"], side["precision"], side["trainer"], *how)
