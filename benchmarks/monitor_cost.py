"""What a monitor costs: forwards of GPT-2's size with and without it, in turn.

Run as ``python -m benchmarks.monitor_cost [--json FILE]``. Weights are random: time does not depend on them.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.environment import environment
from benchmarks.random_models import GPT2, ModelShape, random_model, random_sae, random_tokens
from benchmarks.timing import interleaved
from saelens_certify import Certificate, CertifyConfig, certify
from saelens_certify.monitor import Monitor

_SEQUENCES = 32


@dataclass(frozen=True)
class Row:
    """The cost of one monitor.

    Attributes:
        name: Which sequences are measured.
        share: Share of the sequences that is measured.
        forward_s: Mean seconds of a forward without a monitor.
        in_hooks: Time spent in the monitor's hooks over the rest of the same forwards.
        difference: Mean time of a monitored forward over that of a plain one taken in turn with it,
            minus 1: noisier, but includes what the hooks cost outside of themselves.
        measured: Share of the sequences that was measured in this run.
    """

    name: str
    share: float
    forward_s: float
    in_hooks: float
    difference: float
    measured: float


class _Clocked:
    """Hooks that add up the time they take."""

    def __init__(self, hooks: list[tuple[str, Callable[..., None]]]) -> None:
        self.seconds = 0.0
        self.hooks = [(name, self._clocked(function)) for name, function in hooks]

    def _clocked(self, function: Callable[..., None]) -> Callable[..., None]:
        def timed(activation: torch.Tensor, hook: Any) -> None:
            begin = time.perf_counter()
            function(activation, hook)
            self.seconds += time.perf_counter() - begin

        return timed


def random_certificate(shape: ModelShape, k: int, hook: str) -> tuple[Certificate, Any, Any]:
    """Certify a random SAE on a few random sequences.

    Returns:
        Certificate, model and SAE.
    """
    model, sae = random_model(shape), random_sae(shape, hook)
    certificate = certify(
        model,
        sae,
        calibration=random_tokens(shape, 16, seed=1),
        evaluation=random_tokens(shape, 16, seed=2),
        config=CertifyConfig(coding=f"topk:{k}", progress=False),
    )
    return certificate, model, sae


def measure_cost(
    certificate: Certificate,
    model: Any,
    sae: Any,
    shape: ModelShape,
    shares: tuple[float | None, ...] = (None, 1.0),
    **timing: Any,
) -> list[Row]:
    """Time forwards of 32 sequences of 32 tokens.

    Args:
        certificate: Of the SAE.
        model: The model.
        sae: The SAE.
        shape: Their sizes.
        shares: Shares of the sequences to measure; None: the default.
        **timing: Arguments of `interleaved`.

    Returns:
        One row for each share.
    """
    tokens = random_tokens(shape, 8 * _SEQUENCES, seed=3).split(_SEQUENCES)
    rows = []
    for share in shares:
        monitor = Monitor(certificate, sae, share=share)
        clocked = _Clocked(monitor.hooks(model))
        spent = {"plain": 0.0, "monitored": 0.0}

        @torch.inference_mode()
        def plain(call: int, model: Any = model) -> None:
            model(tokens[call % len(tokens)])

        @torch.inference_mode()
        def monitored(
            call: int, model: Any = model, clocked: _Clocked = clocked, spent: dict = spent
        ) -> None:
            begin = time.perf_counter()
            model.run_with_hooks(tokens[call % len(tokens)], fwd_hooks=clocked.hooks)
            spent["monitored"] += time.perf_counter() - begin

        timings = interleaved({"plain": plain, "monitored": monitored}, **timing)
        means = {name: sum(t.samples) / len(t.samples) for name, t in timings.items()}
        totals = monitor.report().totals
        if totals.errors:
            raise RuntimeError(f"the monitor failed: {monitor.report()}")
        rows.append(
            Row(
                name="default" if share is None else f"share {share:g}",
                share=monitor.share,
                forward_s=means["plain"],
                in_hooks=clocked.seconds / (spent["monitored"] - clocked.seconds),
                difference=means["monitored"] / means["plain"] - 1,
                measured=totals.tested.sequences / totals.sequences,
            )
        )
    return rows


def main(arguments: list[str] | None = None) -> int:
    """Print the table; write it as JSON on request."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path, help="file to write")
    parser.add_argument("--threads", type=int, default=1, help="threads of the model and the SAE")
    parser.add_argument("--rounds", type=int, default=25, help="forwards of each kind and share")
    parser.add_argument("--k", type=int, default=32, help="active features per token")
    parser.add_argument("--toy", action="store_true", help="a tiny shape, to try the script")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    shape = GPT2.toy() if options.toy else GPT2
    hook = "blocks.8.hook_resid_post"
    certificate, model, sae = random_certificate(shape, options.k, hook)
    rows = measure_cost(
        certificate, model, sae, shape, budget_s=1e9, max_rounds=options.rounds, min_rounds=3
    )
    print(f"{shape.title}, {hook}, {shape.d_sae} features, k = {options.k}, "
          f"{_SEQUENCES} x 32 tokens, {options.threads} thread(s)")  # fmt: skip
    print("| sequences | share | measured | forward [ms] | in hooks | difference |")
    print("|---|---|---|---|---|---|")
    for row in rows:
        print(
            f"| {row.name} | {row.share:.3f} | {row.measured:.3f} | {1e3 * row.forward_s:.0f} | "
            f"{100 * row.in_hooks:.1f} % | {100 * row.difference:+.1f} % |"
        )
    if options.json is not None:
        content = {
            "environment": environment(),
            "rounds": options.rounds,
            "rows": [dataclasses.asdict(row) for row in rows],
        }
        options.json.write_text(json.dumps(content, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
