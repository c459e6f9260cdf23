"""Turns what steps and validations return into lines of metrics.jsonl, of the tracker and of the display."""

import time
from typing import Any

from moe_lm.data.prepare import said_skipped
from moe_lm.errors import InputError
from moe_lm.evaluation.bits_per_byte import Validation
from moe_lm.model.accounting import training_flops_per_token
from moe_lm.model.balancing import load_violation
from moe_lm.plain import to_plain
from moe_lm.training.feed import Feed, GlobalBatch
from moe_lm.training.machine import matmul_rate, peak_memory
from moe_lm.training.run import Run
from moe_lm.training.schedule import is_due
from moe_lm.training.sinks import Display, MetricsFile
from moe_lm.training.step import StepResult
from moe_lm.training.tracker import Tracker


class Telemetry:
    """The figures of one run; a context manager that closes every sink."""

    def __init__(self, run: Run):
        config, runtime = run.config, run.runtime
        self._run = run
        self._feed: Feed | None = None
        self._log_interval = config.trainer.log_interval
        self._metrics: MetricsFile | None = None
        runtime.on_main(self._open_metrics)
        self._tracker = Tracker(runtime.is_main, config.tracker, run.directory, config.run_name, to_plain(config))
        self._display = Display(runtime.is_main)
        rate = matmul_rate(runtime.device, run.compute.dtype) * runtime.world_size
        self._utilization_per_token = training_flops_per_token(config.model, config.data.sequence_length) / rate
        self._mark = self._waited = 0.0

    def _open_metrics(self) -> None:
        path = self._run.directory / "metrics.jsonl"
        try:
            self._metrics = MetricsFile(path, self._run.progress.step)
        except OSError as error:
            raise InputError(f"{path}: can not be written ({error.strerror}); move it away.") from error

    def _cut_metrics_back(self) -> None:
        assert self._metrics is not None
        self._metrics.cut_back(self._run.progress.step)

    def begin(self, feed: Feed) -> None:
        """Go on from where the run stands, with these batches."""
        self._feed = feed
        self._display.begin(feed.total_steps, self._run.progress.step)
        self.restart_clock()

    def restart_clock(self) -> None:
        """Begin the next step's time now: saving and validating do not count as training."""
        assert self._feed is not None
        self._mark, self._waited = time.perf_counter(), self._feed.waited

    def __enter__(self) -> "Telemetry":
        return self

    def __exit__(self, *exception: object) -> None:
        self._display.close()
        if self._metrics is not None:
            self._metrics.close()
        self._tracker.close()

    def step(self, result: StepResult, batch: GlobalBatch, data_step: int, learning_rate: float) -> None:
        """Record a finished step."""
        assert self._feed is not None
        now, progress = time.perf_counter(), self._run.progress
        seconds, waited = now - self._mark, self._feed.waited - self._waited
        tokens_per_second = batch.num_routed_tokens / seconds
        self.restart_clock()
        step = progress.step
        violation = load_violation(result.count_LE).max().item() if result.count_LE.numel() else 0.0
        values: dict[str, Any] = {
            "step": step,
            "data_step": data_step,
            "targets": progress.targets,
            "loss": result.cross_entropy,
            "load_balancing_loss": result.load_balancing,
            "router_z_loss": result.router_z,
            **({"router_drift_loss": result.router_drift} if self._run.config.model.router_drift_coef > 0 else {}),
            "gradient_norm": result.gradient_norm,
            "learning_rate": learning_rate,
            "load_violation": violation,
            "tokens_per_second": tokens_per_second,
            "flops_utilization": tokens_per_second * self._utilization_per_token,
            "data_wait": waited / seconds,
        }
        if is_due(step, self._log_interval) or step == 1 or not result.applied:
            detail = {
                "applied": result.applied,
                "peak_memory_bytes": peak_memory(self._run.runtime.device),
                "expert_counts": result.count_LE.int().tolist(),
                "tokens_by_domain": progress.tokens_by_domain,
            }
            if skipped := self._feed.skipped:
                detail["skipped_rows"] = skipped
            if self._run.config.model.capacity_factor is not None:
                detail["dropped_assignments"] = result.dropped
            self._write({**values, **detail})
        self._display.step(step, _figures(values, self._run.config.model.is_mixture))
        if not result.applied:
            cause = f"loss {result.cross_entropy:.4g}, gradient norm {result.gradient_norm:.4g}"
            self.line(f"step {step}: update skipped, {cause} ({self._said(data_step)})")

    def spike(self, result: StepResult, data_step: int, limit: float) -> None:
        """Record that the loss of the step just made is far above those before it."""
        step, policy = self._run.progress.step, self._run.config.guards.spike_policy.name
        event = {"event": "spike", "policy": policy, "data_step": data_step, "loss": result.cross_entropy}
        self._write({"step": step, **event, "limit": limit})
        loss = f"loss {result.cross_entropy:.3f} is a spike (above {limit:.3f})"
        self.line(f"step {step}: {loss}; {self._said(data_step)}; guards.spike_policy={policy}")

    def rewound(self, from_step: int, data_step: int) -> None:
        """Record that the run went back, and forget the figures of the steps that it gave up."""
        progress, margin = self._run.progress, self._run.config.guards.rewind_margin
        self._run.runtime.on_main(self._cut_metrics_back)
        # With the number of the step that comes next, so that going on from the same checkpoint cuts this off as well.
        event = {"event": "rewind", "from_step": from_step, "skipped_data_steps": progress.skipped_data_steps}
        self._write({"step": progress.step + 1, **event})
        first, last = max(0, data_step - margin), data_step + margin
        self.line(f"went back from step {from_step} to step {progress.step}; data steps {first} to {last} are left out")

    def _said(self, data_step: int) -> str:
        """What a global batch is known by."""
        rows = self._run.config.trainer.global_batch_size
        return f"data step {data_step}, rows {data_step * rows} to {(data_step + 1) * rows - 1}"

    def line(self, text: str) -> None:
        """Print a line that stays."""
        self._display.line(text)

    def validation(self, figures: Validation, complete: bool) -> None:
        """Record a validation."""
        step = self._run.progress.step
        values = {"validation_bits_per_byte": figures.bits_per_byte, "validation_loss": figures.loss}
        self._write({"step": step, **values, "complete": complete})
        extent = "whole validation set" if complete else "estimate"
        said = f"{figures.bits_per_byte:.4f} bits per byte"
        if all(shard.spans is not None for shard in self._run.data.validation):
            said = f"loss {figures.loss:.4f} nats per assistant token"
        elif self._run.data.tokenizer.is_by_character:  # what such models are compared by
            said += f", {figures.loss:.4f} nats per token"
        self._display.line(f"step {step}: validation {said} ({extent})")
        self.restart_clock()

    def close_data(self) -> None:
        """Say it where the data ended before the steps did, and what of a stream was left out."""
        assert self._feed is not None
        planned, done = self._run.config.trainer.max_steps, self._run.progress.step
        if done < planned:
            epochs = self._run.config.data.epochs
            self._display.line(f"the data ended after {done} of {planned} steps (data.epochs={epochs})")
        if skipped := self._feed.skipped:
            self._display.line("left out of the streams: " + said_skipped(skipped))

    def _write(self, values: dict[str, Any]) -> None:
        if self._metrics is not None:
            self._metrics.write(values)
        self._tracker.log(values, values["step"])


def _figures(values: dict[str, Any], is_mixture: bool) -> str:
    said = (
        f"loss {values['loss']:.3f}  lr {values['learning_rate']:.1e}  {values['tokens_per_second']:,.0f} tok/s  "
        f"MFU {values['flops_utilization']:.0%}"
    )
    return said + f"  busiest +{values['load_violation']:.0%}" * is_mixture
