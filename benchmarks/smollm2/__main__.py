"""``python -m benchmarks.smollm2``: certify SAEs on a real pretrained model, from nothing.

Fetches SmolLM2-135M-Instruct and English prose, trains TopK SAEs with SAELens at a middle and a late layer
(or takes them from the cache), certifies both on held-out passages, and times the engine against the published
protocol. Results go to ``--json``.
"""

from __future__ import annotations

import argparse
import json
import time
import warnings
from pathlib import Path
from typing import Any

from benchmarks.environment import environment
from benchmarks.smollm2.certificates import certify_layer, speed
from benchmarks.smollm2.fetch import CACHE_DIR
from benchmarks.smollm2.model import load_smollm2
from benchmarks.smollm2.sharp import against_published, small_pool
from benchmarks.smollm2.text import Split, sequences
from benchmarks.smollm2.train_saes import HOOKS, LENGTH, PRESETS, trained_saes
from saelens_certify.report import (
    certificate_figure,
    print_certificate,
    write_picture,
    write_report,
)


def main(argv: list[str] | None = None) -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--preset", choices=sorted(PRESETS), default="ci", help="SAE training")
    parser.add_argument("--calibration", type=int, default=1000, help="calibration sequences")
    parser.add_argument("--evaluation", type=int, default=1200, help="evaluation sequences")
    parser.add_argument(
        "--timing", type=int, default=128, help="sequences to time on; 0: no timing"
    )
    parser.add_argument("--cache_dir", type=Path, default=CACHE_DIR)
    parser.add_argument("--output", type=Path, help="runs' folder (default: in the cache)")
    parser.add_argument("--json", type=Path, help="where to write the results")
    parser.add_argument("--pictures", type=Path, help="folder for PNG figures")
    options = parser.parse_args(argv)
    warnings.simplefilter("ignore", DeprecationWarning)

    started = time.perf_counter()
    model = load_smollm2(cache_dir=options.cache_dir)
    saes = trained_saes(options.preset, HOOKS, options.cache_dir, model)
    prose = PRESETS[options.preset].prose
    splits: tuple[Split, ...] = ("calibration", "evaluation")
    tokens = {
        split: sequences(
            split, model.tokenizer, LENGTH, getattr(options, split), prose, options.cache_dir
        )
        for split in splits
    }
    runs = options.output or options.cache_dir / "smollm2" / "runs" / options.preset
    results: dict[str, Any] = {"environment": environment(), "preset": options.preset, "layers": {}}
    for hook, sae in saes.items():
        since = time.perf_counter()
        folder = runs / f"{hook}-{options.calibration}-{options.evaluation}"
        certificate = certify_layer(model, sae, **tokens, output=folder)
        print_certificate(certificate)
        write_report(certificate, folder / "report.html")
        if options.pictures is not None:
            options.pictures.mkdir(parents=True, exist_ok=True)
            write_picture(certificate_figure(certificate), options.pictures / f"smollm2-{hook}.png")
        results["layers"][hook] = {
            "seconds": time.perf_counter() - since,
            "verdict": certificate.verdict(),
            **certificate.to_metrics()["faithfulness_certificate"],
            "sharp": against_published(certificate),
            "small_pool": small_pool(model, sae, **tokens, output=Path(f"{folder}-small-pool")),
        }
        if options.timing:
            results["layers"][hook]["speed"] = speed(
                model, sae, tokens["evaluation"][: options.timing]
            )
            print(json.dumps(results["layers"][hook]["speed"], indent=2))
    results["seconds"] = time.perf_counter() - started
    if options.json is not None:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(results, indent=2) + "\n")
    print(f"done after {results['seconds']:.0f} s")


if __name__ == "__main__":
    main()
