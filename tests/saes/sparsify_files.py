"""Checkpoints in sparsify's format, and what they compute, written from the format's description.

sparsify's own class (package ``eai-sparsify``) is used beside them: it writes the same checkpoints, and its
forward pass is compared with too.
"""

from __future__ import annotations

import importlib
import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

# Its Triton kernel needs a GPU even to import; the plain form computes the same.
os.environ.setdefault("SPARSIFY_DISABLE_TRITON", "1")
SparseCoder: Any = importlib.import_module("sparsify.sparse_coder").SparseCoder
SparseCoderConfig: Any = importlib.import_module("sparsify.config").SparseCoderConfig


@dataclass(frozen=True)
class Checkpoint:
    """Settings and tensors of one sparse coder, tensors as they are stored."""

    config: dict[str, Any]
    tensors: dict[str, Tensor]

    def latents(self, x: Tensor) -> Tensor:
        """Dense features of float64 inputs, in float64."""
        config, stored = self.config, {n: t.double() for n, t in self.tensors.items()}
        u = x.double()
        if not config["transcode"]:
            u = u - stored["b_dec"]
        scores = (u @ stored["encoder.weight"].T + stored["encoder.bias"]).clamp(min=0)
        if config.get("signed"):
            scores = u @ stored["encoder.weight"].T + stored["encoder.bias"]
        kept = torch.zeros_like(scores)
        for token, row in enumerate(scores):
            for feature in self._selected(row):
                kept[token, feature] = row[feature]
        return kept

    def forward(self, x: Tensor) -> Tensor:
        """What the sparse coder returns, in float64."""
        out = self.latents(x) @ self.tensors["W_dec"].double() + self.tensors["b_dec"].double()
        if self.config["skip_connection"]:
            out = out + x.double() @ self.tensors["W_skip"].double().T
        return out

    def margin(self, x: Tensor) -> Tensor:
        """How far each token's selection is from another one, in units of its largest score."""
        plain = Checkpoint({**self.config, "k": self.tensors["W_dec"].shape[0]}, self.tensors)
        if self.config["activation"] == "groupmax":
            plain.config["activation"] = "topk"
            groups = plain.latents(x).unflatten(-1, (self.config["k"], -1))
            best = groups.topk(2, dim=-1).values
            gaps = (best[..., 0] - best[..., 1]).amin(dim=-1)
        else:
            best = plain.latents(x).abs().topk(self.config["k"] + 1, dim=-1).values
            gaps = best[:, -2] - best[:, -1]
        return gaps / plain.latents(x).abs().amax(dim=-1)

    def _selected(self, row: Tensor) -> list[int]:
        k = self.config["k"]
        if self.config["activation"] == "groupmax":
            size = len(row) // k
            return [g * size + int(row[g * size : (g + 1) * size].argmax()) for g in range(k)]
        return row.abs().argsort(descending=True)[:k].tolist()


def checkpoint(
    d_in: int = 16,
    expansion_factor: int = 4,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    **settings: Any,
) -> Checkpoint:
    """A random sparse coder whose parts all matter to its output."""
    config = {
        "activation": "topk",
        "expansion_factor": expansion_factor,
        "normalize_decoder": True,
        "num_latents": 0,
        "k": 4,
        "multi_topk": False,
        "skip_connection": False,
        "transcode": False,
        **settings,
        "d_in": d_in,
    }
    d_sae = config["num_latents"] or d_in * expansion_factor
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    tensors = {
        "encoder.weight": draw(d_sae, d_in) / d_in**0.5,
        "encoder.bias": 0.3 * draw(d_sae),
        "W_dec": torch.nn.functional.normalize(draw(d_sae, d_in), dim=-1),
        "b_dec": draw(d_in),
    }
    if not config["normalize_decoder"]:
        tensors["W_dec"] *= 0.5 + draw(d_sae, 1).abs()
    if config["skip_connection"]:
        tensors["W_skip"] = draw(d_in, d_in) / d_in**0.5
    return Checkpoint(config, {name: t.to(dtype).contiguous() for name, t in tensors.items()})


def inputs(n: int, d_in: int = 16, seed: int = 1) -> Tensor:
    """Activations that are not centred."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, d_in, generator=generator) + 0.5 * torch.randn(d_in, generator=generator)


def write(coder: Checkpoint, folder: Path) -> Path:
    """Write a checkpoint as sparsify lays it out."""
    folder.mkdir(parents=True, exist_ok=True)
    save_file(coder.tensors, folder / "sae.safetensors", metadata={"format": "pt"})
    (folder / "cfg.json").write_text(json.dumps(coder.config))
    return folder


def write_with_sparsify(coder: Checkpoint, folder: Path) -> Path:
    """Write a checkpoint by sparsify's own class."""
    sparsify_coder(coder).save_to_disk(folder)
    return folder


def sparsify_coder(coder: Checkpoint) -> Any:
    """sparsify's own object with the weights of a checkpoint."""
    settings = {key: value for key, value in coder.config.items() if key != "d_in"}
    own = SparseCoder(
        coder.config["d_in"],
        SparseCoderConfig(**settings),
        dtype=coder.tensors["W_dec"].dtype,
    )
    own.load_state_dict(coder.tensors)
    return own


def sparsify_forward(coder: Checkpoint, x: Tensor) -> Tensor:
    """What sparsify's own class returns."""
    own, x = sparsify_coder(coder), x.to(coder.tensors["W_dec"].dtype)
    with torch.no_grad():
        if not coder.config["multi_topk"]:
            return own(x).sae_out
        # Its forward then returns the reconstruction of the training loss, from 4 k features; k of
        # them are what encode() gives.
        top_acts, top_indices, _ = own.encode(x)
        return own.decode(top_acts, top_indices)


# Every test of a conversion runs with each way to write and each way to compute.
WRITERS: dict[str, Callable[[Checkpoint, Path], Path]] = {
    "format": write,
    "sparsify": write_with_sparsify,
}
FORWARDS: dict[str, Callable[[Checkpoint, Tensor], Tensor]] = {
    "float64": Checkpoint.forward,
    "sparsify": sparsify_forward,
}
