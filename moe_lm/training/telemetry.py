"""Turns what steps and validations return into lines of metrics.jsonl, of the tracker and of the display."""

import time
from typing import Any

from moe_lm.data.prepare import said_skipped
from moe_lm.model.accounting import training_flops_per_token
from moe_lm.model.balancing import load_violation
from moe_lm.training.config import to_plain
from moe_lm.training.feed import Feed
from moe_lm.training.machine import matmul_rate, peak_memory
from moe_lm.training.run import Run
from moe_lm.training.schedule import is_due
from moe_lm.training.sinks import Display, MetricsFile, Tracker
from moe_lm.training.step import StepResult


class Telemetry:
    """The figures of one run; a context manager that closes every sink."""

    def __init__(self, run: Run, feed: Feed):
        config, runtime = run.config, run.runtime
        self._run, self._progress, self._feed = run, run.progress, feed
        self._log_interval = config.trainer.log_interval
        self._metrics = MetricsFile(run.directory / "metrics.jsonl", self._progress.step) if runtime.is_main else None
        self._tracker = Tracker(runtime.accelerator, config.tracker, run.directory, config.run_name, to_plain(config))
        self._display = Display(runtime.is_main, feed.total_steps, self._progress.step)
        rate = matmul_rate(runtime.device, run.compute.dtype) * runtime.world_size
        self._utilization_per_token = training_flops_per_token(config.model, config.data.sequence_length) / rate
        self.restart_clock()

    def restart_clock(self) -> None:
        """Begin the next step's time now: saving and validating do not count as training."""
        self._mark = time.perf_counter()
        self._waited = self._feed.waited

    def __enter__(self) -> "Telemetry":
        return self

    def __exit__(self, *exception: object) -> None:
        self._display.close()
        self._tracker.close()
        if self._metrics is not None:
            self._metrics.close()

    def step(self, result: StepResult, num_tokens: int, learning_rate: float) -> None:
        """Record a finished step."""
        now = time.perf_counter()
        seconds, waited = now - self._mark, self._feed.waited - self._waited
        tokens_per_second = num_tokens / seconds
        self.restart_clock()
        step = self._progress.step
        violation = load_violation(result.count_LE).max().item() if result.count_LE.numel() else 0.0
        values: dict[str, Any] = {
            "step": step,
            "targets": self._progress.targets,
            "loss": result.cross_entropy,
            "load_balancing_loss": result.load_balancing,
            "router_z_loss": result.router_z,
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
                "tokens_by_domain": self._progress.tokens_by_domain,
            }
            if skipped := self._feed.skipped:
                detail["skipped_rows"] = skipped
            self._write({**values, **detail})
        self._display.step(step, _figures(values))
        if not result.applied:
            cause = f"loss {result.cross_entropy}, gradient norm {result.gradient_norm}"
            self._display.line(f"step {step}: update skipped, {cause}")

    def validation(self, value: float, complete: bool) -> None:
        """Record a validation."""
        best = self._progress.best_bits_per_byte
        self._progress.best_bits_per_byte = value if best is None else min(best, value)
        step = self._progress.step
        self._write({"step": step, "validation_bits_per_byte": value, "complete": complete})
        extent = "whole validation set" if complete else "estimate"
        self._display.line(f"step {step}: validation {value:.4f} bits per byte ({extent})")
        self.restart_clock()

    def close_data(self) -> None:
        """Say it where the data ended before the steps did, and what of a stream was left out."""
        planned, done = self._run.config.trainer.max_steps, self._progress.step
        if done < planned:
            epochs = self._run.config.data.epochs
            self._display.line(f"the data ended after {done} of {planned} steps (data.epochs={epochs})")
        if skipped := self._feed.skipped:
            self._display.line("left out of the streams: " + said_skipped(skipped))

    def _write(self, values: dict[str, Any]) -> None:
        if self._metrics is not None:
            self._metrics.write(values)
        self._tracker.log(values, values["step"])


def _figures(values: dict[str, Any]) -> str:
    return (
        f"loss {values['loss']:.3f}  lr {values['learning_rate']:.1e}  {values['tokens_per_second']:,.0f} tok/s  "
        f"MFU {values['flops_utilization']:.0%}  busiest +{values['load_violation']:.0%}"
    )
