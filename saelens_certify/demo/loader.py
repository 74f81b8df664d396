"""Loads the bundled model, SAEs and documents. Nothing here needs a network."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal, get_args

import torch
from jaxtyping import Int64
from sae_lens import SAE
from safetensors import safe_open
from torch import Tensor
from transformer_lens import HookedTransformer, HookedTransformerConfig
from transformer_lens.model_bridge import TransformerBridge
from transformer_lens.pretrained.weight_conversions.llama import convert_llama_weights
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from saelens_certify.data.hashing import file_hash
from saelens_certify.data.sequences import DataSource, Sequences
from saelens_certify.errors import CertifyError

ASSETS = Path(__file__).parent / "assets"
"""Folder of the bundled files."""

MODEL_NAME = "saelens-certify-demo"
"""Name of the bundled model, as in the metadata of its SAEs."""

DEFAULT_SAE = "layer4-topk"
"""The SAE that the demo certifies unless told otherwise: a late layer."""

ModelClass = Literal["TransformerBridge", "HookedTransformer"]
Split = Literal["calibration", "evaluation"]


def load_tokenizer(assets: Path = ASSETS) -> Any:
    """The demo's tokenizer; it puts ``<|bos|>`` (id 0) first."""
    return AutoTokenizer.from_pretrained(
        str(assets / "model"), add_bos_token=True, local_files_only=True
    )


def load_hf_model(assets: Path = ASSETS, device: str = "cpu") -> LlamaForCausalLM:
    """The demo's model as transformers has it: stored as float16, held as float32.

    The frozen model *is* the stored one; widening loses nothing.
    """
    model = LlamaForCausalLM.from_pretrained(
        str(assets / "model"),
        dtype=torch.float32,
        attn_implementation="eager",
        local_files_only=True,
    )
    return model.to(torch.device(device)).eval()  # pyright: ignore[reportArgumentType]


def load_model(
    model_class: ModelClass = "TransformerBridge", device: str = "cpu", assets: Path = ASSETS
) -> TransformerBridge | HookedTransformer:
    """Loads the bundled language model.

    Args:
        model_class: ``"TransformerBridge"``, or ``"HookedTransformer"`` by TransformerLens's own
            conversion of Llama weights with all weight processing off.
        device: Device of the parameters.
        assets: Folder of the bundled files.

    Returns:
        The model in float32 with its tokenizer, ready for hooks.

    Raises:
        CertifyError: ``model_class`` is not one of the two.
    """
    if model_class not in get_args(ModelClass):
        raise CertifyError(
            f"model_class {model_class!r} is unknown; use one of {list(get_args(ModelClass))}"
        )
    hf_model = load_hf_model(assets, device)
    tokenizer = load_tokenizer(assets)
    if model_class == "TransformerBridge":
        bridge = TransformerBridge.boot_transformers(
            str(assets / "model"), hf_model=hf_model, tokenizer=tokenizer, device=device
        )
        bridge.cfg.model_name = MODEL_NAME
        return bridge.eval()
    hooked = HookedTransformer(hooked_config(hf_model.config, device), tokenizer=tokenizer)
    # Conversion adds the biases that Llama lacks as zeros; the causal mask is a buffer.
    state = convert_llama_weights(hf_model, hooked.cfg)
    hooked.load_state_dict(state, strict=False)
    return hooked.eval()


def hooked_config(config: LlamaConfig, device: str = "cpu") -> HookedTransformerConfig:
    """TransformerLens's description of a Llama without grouped queries or rope scaling."""
    d_head = config.hidden_size // config.num_attention_heads
    rope = config.rope_parameters or {}
    return HookedTransformerConfig(
        model_name=MODEL_NAME,
        n_layers=config.num_hidden_layers,
        d_model=config.hidden_size,
        n_ctx=config.max_position_embeddings,
        n_heads=config.num_attention_heads,
        d_head=d_head,
        d_mlp=config.intermediate_size,
        d_vocab=config.vocab_size,
        act_fn=config.hidden_act,
        eps=config.rms_norm_eps,
        normalization_type="RMS",
        positional_embedding_type="rotary",
        rotary_dim=d_head,
        rotary_base=int(rope.get("rope_theta") or 10_000),
        rotary_adjacent_pairs=False,
        gated_mlp=True,
        final_rms=True,
        original_architecture="LlamaForCausalLM",
        tokenizer_prepends_bos=True,
        default_prepend_bos=True,
        dtype=torch.float32,
        device=device,
    )


def sae_names(assets: Path = ASSETS) -> list[str]:
    """Names of the bundled SAEs, for :func:`load_sae`."""
    return sorted(path.parent.name for path in assets.glob("saes/*/cfg.json"))


def load_sae(name: str, device: str = "cpu", assets: Path = ASSETS) -> SAE[Any]:
    """Loads a bundled SAE with SAELens's own loader.

    Args:
        name: One of :func:`sae_names`.
        device: Device of the parameters.
        assets: Folder of the bundled files.

    Returns:
        The SAE in inference form, float32; ``sae.cfg.metadata.hook_name`` is where it belongs.

    Raises:
        CertifyError: No bundled SAE has that name.
    """
    names = sae_names(assets)
    if name not in names:
        raise CertifyError(f"no bundled SAE is called {name!r}; there are {', '.join(names)}")
    return SAE.load_from_disk(assets / "saes" / name, device=device)


def load_tokens(
    split: Split, seq_len: int = 32, assets: Path = ASSETS
) -> tuple[Int64[Tensor, "sequence pos"], list[str]]:
    """The first tokens of each bundled document.

    Two passages may begin alike. A calibration document whose first ``seq_len`` tokens are
    also those of an evaluation document is left out; no evaluation document is.

    Args:
        split: ``"calibration"`` or ``"evaluation"``; neither was seen in training.
        seq_len: Tokens of each sequence, BOS included. Shorter documents are left out.
        assets: Folder of the bundled files.

    Returns:
        Token ids, and the documents' ids (SHA-256 of the text) in the same order.

    Raises:
        CertifyError: The split is unknown, or no document has that many stored tokens.
    """
    if split not in get_args(Split):
        raise CertifyError(f"split {split!r} is unknown; use one of {list(get_args(Split))}")
    sequences, ids = _stored_tokens(split, seq_len, assets)
    if split == "evaluation":
        return sequences, ids
    evaluated = {tuple(row) for row in _stored_tokens("evaluation", seq_len, assets)[0].tolist()}
    kept = [row for row, tokens in enumerate(sequences.tolist()) if tuple(tokens) not in evaluated]
    return sequences[kept], [ids[row] for row in kept]


def _stored_tokens(
    split: Split, seq_len: int, assets: Path
) -> tuple[Int64[Tensor, "sequence pos"], list[str]]:
    with safe_open(assets / "text" / f"{split}.safetensors", framework="pt") as file:
        tokens = file.get_tensor("tokens").to(torch.int64)
        offsets = file.get_tensor("offsets").to(torch.int64)
        hashes = file.get_tensor("sha256")
    starts, lengths = offsets[:-1], offsets.diff()
    if not 1 < seq_len <= int(lengths.max()):
        raise CertifyError(
            f"seq_len {seq_len} is impossible: documents are stored with 2 to "
            f"{int(lengths.max())} tokens"
        )
    kept = lengths >= seq_len
    sequences = tokens[starts[kept, None] + torch.arange(seq_len, device=tokens.device)]
    return sequences, [bytes(row).hex() for row in hashes[kept].tolist()]


def load_sequences(split: Split, seq_len: int = 32, assets: Path = ASSETS) -> Sequences:
    """:func:`load_tokens` with its provenance, as :func:`saelens_certify.certify` takes it."""
    tokens, ids = load_tokens(split, seq_len, assets)
    path = assets / "text" / f"{split}.safetensors"
    with safe_open(path, framework="pt") as file:
        stored = len(file.get_tensor("sha256"))
        lengths = file.get_tensor("offsets").diff()
    too_short = int((lengths < seq_len).sum())
    repeated = stored - too_short - len(ids)
    source = DataSource(
        kind="safetensors",
        location=f"{MODEL_NAME}:{path.name}",
        split=split,
        column="tokens",
        fingerprint=file_hash(path),
        n_documents_read=stored,
        n_too_short=too_short,
        tokenizer=MODEL_NAME,
        prepends_bos=True,
        first_token=0,
        selection=(f"without {repeated} sequences of evaluation",) if repeated else (),
    )
    return Sequences.from_tokens(tokens, ids, source)


def load_texts(split: Split, seq_len: int = 32, assets: Path = ASSETS) -> list[str]:
    """The text of :func:`load_tokens`, decoded without BOS."""
    tokens, _ = load_tokens(split, seq_len, assets)
    return load_tokenizer(assets).batch_decode(tokens[:, 1:].tolist())
