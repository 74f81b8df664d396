"""Models and SAEs of known shapes with random weights: timing needs no others, and no network."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor


@dataclass(frozen=True)
class ModelShape:
    """A model and the SAEs that are put into it.

    Attributes:
        title: Whose shape this is, and how much of it.
        settings: Arguments of ``HookedTransformerConfig``.
        d_sae: Features of each SAE.
        dtype: Type of the model's weights.
        sae_dtype: Type of the SAE's weights.
    """

    title: str
    settings: dict[str, Any] = field(hash=False)
    d_sae: int
    dtype: torch.dtype = torch.float32
    sae_dtype: torch.dtype = torch.float32

    def toy(self) -> ModelShape:
        """Return the same architecture at a size for tests, with as many layers as GPT-2."""
        small = {"n_layers": 12, "d_model": 32, "d_head": 8, "n_heads": 4, "d_mlp": 64}
        small |= {"d_vocab": 211, "n_ctx": 64}
        if "rotary_dim" in self.settings:
            small |= {"rotary_dim": 8, "n_layers": 2}
        if "n_key_value_heads" in self.settings:
            small |= {"n_key_value_heads": 2}
        return replace(self, settings=self.settings | small, d_sae=384)


GPT2 = ModelShape(
    "GPT-2 small",
    {
        "n_layers": 12,
        "d_model": 768,
        "d_head": 64,
        "n_heads": 12,
        "d_mlp": 3072,
        "d_vocab": 50257,
        "n_ctx": 1024,
        "act_fn": "gelu_new",
        "normalization_type": "LN",
    },
    24576,
)

_ROTARY = {"normalization_type": "RMS", "positional_embedding_type": "rotary", "gated_mlp": True}

GEMMA_2B = ModelShape(
    "Gemma-2B, 2 of 18 layers",
    {
        "n_layers": 2,
        "d_model": 2048,
        "d_head": 256,
        "n_heads": 8,
        "n_key_value_heads": 1,
        "d_mlp": 16384,
        "d_vocab": 256000,
        "n_ctx": 1024,
        "act_fn": "gelu_new",
        "rotary_dim": 256,
        **_ROTARY,
    },
    16384,
    torch.bfloat16,
)

LLAMA_3_8B = ModelShape(
    "Llama-3-8B, 2 of 32 layers",
    {
        "n_layers": 2,
        "d_model": 4096,
        "d_head": 128,
        "n_heads": 32,
        "n_key_value_heads": 8,
        "d_mlp": 14336,
        "d_vocab": 128256,
        "n_ctx": 1024,
        "act_fn": "silu",
        "rotary_dim": 128,
        **_ROTARY,
    },
    131072,
    torch.bfloat16,
    torch.bfloat16,
)


def random_model(shape: ModelShape) -> Any:
    """Build a HookedTransformer with random weights."""
    from transformer_lens import HookedTransformer, HookedTransformerConfig

    torch.manual_seed(0)
    # init_weights=False leaves uninitialised memory; filling it here is faster than the library's way.
    config = HookedTransformerConfig(
        **shape.settings, device="cpu", dtype=shape.dtype, init_weights=False
    )
    model = HookedTransformer(config)
    for name, parameter in model.named_parameters():
        with torch.no_grad():
            if name.endswith(".w"):
                parameter.fill_(1.0)
            elif parameter.dim() > 1 or ".W_" in name:
                parameter.normal_(std=0.02)
            else:
                parameter.zero_()
    return model.eval()


def random_sae(shape: ModelShape, hook: str, seed: int = 0) -> Any:
    """Build a SAELens standard SAE for a hook, decoder rows of norm 1."""
    from sae_lens import StandardSAE
    from sae_lens.saes.sae import SAEMetadata
    from sae_lens.saes.standard_sae import StandardSAEConfig

    torch.manual_seed(1 + seed)
    sae = StandardSAE(
        StandardSAEConfig(
            d_in=shape.settings["d_model"],
            d_sae=shape.d_sae,
            metadata=SAEMetadata(hook_name=hook),
        )
    )
    with torch.no_grad():
        sae.W_dec.div_(sae.W_dec.norm(dim=1, keepdim=True))
        sae.W_enc.copy_(sae.W_dec.T)
    return sae.to(shape.sae_dtype).eval()


def random_tokens(shape: ModelShape, n_sequences: int, seed: int) -> Int[Tensor, "sequences 32"]:
    """Draw sequences of 32 tokens."""
    source = torch.Generator().manual_seed(seed)
    return torch.randint(shape.settings["d_vocab"], (n_sequences, 32), generator=source)
