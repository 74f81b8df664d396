"""Tiny random models and SAEs, and text for them: real classes, no network."""

from __future__ import annotations

import functools
import warnings
from typing import Any

import sae_lens
import torch
from sae_lens import HookedSAETransformer
from sae_lens.analysis.sae_transformer_bridge import SAETransformerBridge
from sae_lens.saes.sae import SAEMetadata
from tokenizers import Tokenizer, models
from torch import Tensor
from transformer_lens import HookedTransformer, HookedTransformerConfig
from transformer_lens.model_bridge import TransformerBridge
from transformer_lens.pretrained.weight_conversions.gpt2 import convert_gpt2_weights
from transformer_lens.pretrained.weight_conversions.llama import convert_llama_weights
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from saelens_certify.demo.loader import hooked_config
from saelens_certify.saes.classes import OWN_CLASSES

D_MODEL, D_SAE, D_VOCAB, N_LAYERS, SEQ_LEN = 32, 96, 101, 3, 12
BOS = 0


@functools.cache
def hooked_transformer(**overrides: Any) -> HookedTransformer:
    """A HookedTransformer of 3 blocks whose predictions are far from uniform."""
    settings: dict[str, Any] = {
        "n_layers": N_LAYERS, "d_model": D_MODEL, "n_ctx": 64, "d_head": 8, "n_heads": 4,
        "d_mlp": 64, "d_vocab": D_VOCAB, "act_fn": "gelu", "normalization_type": "LN",
        "seed": 1, "device": "cpu", "init_weights": True,
    }  # fmt: skip
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = HookedTransformer(HookedTransformerConfig(**{**settings, **overrides}))
    _sharpen(model)
    return model.eval()


def _hf_llama(n_key_value_heads: int = 2) -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=D_VOCAB, hidden_size=D_MODEL, intermediate_size=64,
            num_hidden_layers=N_LAYERS, num_attention_heads=4,
            num_key_value_heads=n_key_value_heads,
            max_position_embeddings=64, initializer_range=0.2, bos_token_id=BOS, eos_token_id=1,
        )
    )  # fmt: skip


def _hf_gpt2() -> GPT2LMHeadModel:
    torch.manual_seed(0)
    return GPT2LMHeadModel(
        GPT2Config(
            vocab_size=D_VOCAB, n_embd=D_MODEL, n_layer=N_LAYERS, n_head=4, n_positions=64,
            initializer_range=0.2, bos_token_id=BOS, eos_token_id=1,
        )
    )  # fmt: skip


@functools.cache
def llama_bridge() -> Any:
    """A TransformerBridge around a Llama (blocks return tensors)."""
    return _bridge(_hf_llama(), "tiny-llama")


@functools.cache
def gpt2_bridge() -> Any:
    """A TransformerBridge around a GPT-2 (blocks return tuples in some versions, dropout in training)."""
    return _bridge(_hf_gpt2(), "tiny-gpt2")


MODEL_CLASSES = (
    "HookedTransformer",
    "HookedSAETransformer",
    "TransformerBridge",
    "SAETransformerBridge",
)


@functools.cache
def of_class(model_class: str, family: str = "gpt2", dtype: torch.dtype = torch.float32) -> Any:
    """The same weights in each of TransformerLens's and SAELens's model classes.

    Args:
        model_class: One of `MODEL_CLASSES`.
        family: ``"gpt2"`` (layer norm with biases) or ``"llama"`` (RMS norm, gated MLP).
        dtype: Dtype of the parameters.
    """
    hf_model: Any = _hf_gpt2() if family == "gpt2" else _hf_llama(n_key_value_heads=4)
    hf_model = hf_model.to(dtype)
    name = f"tiny-{family}"
    if model_class == "TransformerBridge":
        return _bridge(hf_model, name)
    if model_class == "SAETransformerBridge":
        return _bridge(hf_model, name, SAETransformerBridge)
    config = hooked_config(hf_model.config) if family == "llama" else _hooked_gpt2_config()
    config.dtype = dtype
    convert = convert_llama_weights if family == "llama" else convert_gpt2_weights
    made_of = {"HookedTransformer": HookedTransformer, "HookedSAETransformer": HookedSAETransformer}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = made_of[model_class](config)
    state = {key: value.to(dtype) for key, value in convert(hf_model, model.cfg).items()}
    model.load_state_dict(state, strict=False)
    model.set_tokenizer(_tokenizer(name))
    return model.eval()


def _hooked_gpt2_config() -> HookedTransformerConfig:
    return HookedTransformerConfig(
        n_layers=N_LAYERS, d_model=D_MODEL, n_ctx=64, d_head=D_MODEL // 4, n_heads=4,
        d_mlp=4 * D_MODEL, d_vocab=D_VOCAB, act_fn="gelu_new", normalization_type="LN",
        original_architecture="GPT2LMHeadModel", tokenizer_prepends_bos=True, device="cpu",
    )  # fmt: skip


FACTORIES: dict[str, tuple[type, type]] = {
    "standard": (sae_lens.StandardSAE, sae_lens.StandardSAEConfig),
    "topk": (sae_lens.TopKSAE, sae_lens.TopKSAEConfig),
    "abstopk": (sae_lens.AbsTopKSAE, sae_lens.AbsTopKSAEConfig),
    "jumprelu": (sae_lens.JumpReLUSAE, sae_lens.JumpReLUSAEConfig),
    "gated": (sae_lens.GatedSAE, sae_lens.GatedSAEConfig),
    "matching_pursuit": (sae_lens.MatchingPursuitSAE, sae_lens.MatchingPursuitSAEConfig),
    "temporal": (sae_lens.TemporalSAE, sae_lens.TemporalSAEConfig),
    "transcoder": (sae_lens.Transcoder, sae_lens.TranscoderConfig),
    "skip_transcoder": (sae_lens.SkipTranscoder, sae_lens.SkipTranscoderConfig),
    "jumprelu_transcoder": (sae_lens.JumpReLUTranscoder, sae_lens.JumpReLUTranscoderConfig),
    "jumprelu_skip_transcoder": (
        sae_lens.JumpReLUSkipTranscoder,
        sae_lens.JumpReLUSkipTranscoderConfig,
    ),
}
"""SAELens's inference classes by architecture, each with its configuration."""

ALL_KINDS = (*FACTORIES, *OWN_CLASSES)
"""SAELens's architectures and those of this package."""

TRANSCODERS = tuple(kind for kind in ALL_KINDS if "transcoder" in kind)


def make_sae(
    kind: str = "topk",
    hook: str = "blocks.1.hook_resid_post",
    hook_out: str | None = None,
    **overrides: Any,
) -> Any:
    """A random SAE of the kind, roughly reconstructing (tied directions), with every term at work."""
    settings: dict[str, Any] = {
        "d_in": D_MODEL, "d_sae": D_SAE, "device": "cpu", "dtype": "float32",
        "metadata": SAEMetadata(hook_name=hook, model_name=None),
    }  # fmt: skip
    if "topk" in kind or "groupmax" in kind:
        settings["k"] = 8
    if kind == "temporal":
        # Attention over features, in heads that must divide d_sae.
        settings |= {"n_heads": 2, "bottleneck_factor": 8, "kval_topk": 6}
    if kind == "matching_pursuit":
        settings["max_iterations"] = 6
    if kind in TRANSCODERS:
        settings |= {"d_out": overrides.get("d_in", D_MODEL), "apply_b_dec_to_input": False}
        settings["metadata"].hook_name_out = hook_out or "blocks.1.hook_mlp_out"
    sae_class, config_class = FACTORIES.get(kind) or _own_class(kind)
    with torch.random.fork_rng():
        torch.manual_seed(3)
        sae: Any = sae_class(config_class(**{**settings, **overrides}))
        _fill(sae, kind)
    return sae


def _own_class(kind: str) -> tuple[type, type]:
    own = OWN_CLASSES[kind]
    return own, own.config_class


@torch.no_grad()
def _fill(sae: Any, kind: str) -> None:
    if kind == "jumprelu":
        sae.threshold.data.uniform_(-0.1, 0.6)
    sae.W_dec.data = torch.nn.functional.normalize(torch.randn_like(sae.W_dec), dim=-1)
    if kind != "matching_pursuit":
        sae.W_dec.data *= 1 + 0.3 * torch.rand(sae.W_dec.shape[0], 1).to(sae.W_dec)
    if kind not in ("matching_pursuit", "temporal"):
        square = sae.W_dec.shape[1] == sae.W_enc.shape[0]
        sae.W_enc.data = sae.W_dec.data.T.contiguous() if square else sae.W_enc.data
    sae.b_dec.data.normal_(std=0.1)
    if getattr(sae, "b_enc", None) is not None:
        sae.b_enc.data.normal_(mean=-0.2, std=0.1)
    if kind == "gated":
        sae.b_gate.data.normal_(mean=-0.2, std=0.3)
        sae.b_mag.data.normal_(mean=0.1, std=0.3)
        sae.r_mag.data.normal_(std=0.4)
    if "jumprelu_" in kind:
        sae.threshold.data.uniform_(-0.1, 0.6)
    if "skip" in kind:
        sae.W_skip.data.normal_(std=0.2)


def make_tokens(n: int, seed: int, length: int = SEQ_LEN) -> Tensor:
    """Sequences that begin with BOS; token frequencies fall like those of text."""
    generator = torch.Generator().manual_seed(seed)
    weights = 1 / torch.arange(1, D_VOCAB - 1, dtype=torch.float64)
    tokens = torch.multinomial(weights, n * length, replacement=True, generator=generator) + 2
    tokens = tokens.reshape(n, length)
    tokens[:, 0] = BOS
    return tokens


def _sharpen(model: Any) -> None:
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.startswith(("blocks", "embed")):
                parameter.mul_(2.0)
            elif "W_U" in name:
                parameter.mul_(4.0)


def _tokenizer(name: str) -> PreTrainedTokenizerFast:
    vocabulary = {f"w{i}": i for i in range(D_VOCAB)}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(vocabulary, unk_token="w1")),
        bos_token=f"w{BOS}", eos_token="w1", pad_token="w1", name_or_path=name,
    )  # fmt: skip
    tokenizer.init_kwargs.update(name_or_path=name, add_bos_token=True)
    return tokenizer


def _bridge(hf_model: Any, name: str, bridge_class: Any = TransformerBridge) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return bridge_class.boot_transformers(
            name, hf_model=hf_model.eval(), tokenizer=_tokenizer(name), device="cpu"
        ).eval()
