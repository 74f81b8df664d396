"""Which parameters of each SAELens architecture go where in the adapter.

A new architecture is one function here and one line in `BUILDERS`. Architectures that are not listed go
through their own ``encode`` and ``decode``.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from saelens_certify.errors import CertifyError
from saelens_certify.saes.adapter import SAEAdapter
from saelens_certify.saes.copies import working_copy
from saelens_certify.saes.fused import FusedAdapter
from saelens_certify.saes.normalize import TokenMap, check_mode, normalize
from saelens_certify.saes.own import DenseCodes, OwnCodecAdapter, OwnEncoderAdapter


def adapt(sae: Any) -> SAEAdapter:
    """Turn a SAELens SAE into the adapter behind every proxy.

    The SAE is read, never changed; where it is encoded by our operators, its encoder is copied once
    (transposed); its decoder is shared.

    Args:
        sae: A SAELens SAE or transcoder, of an architecture of SAELens or of a class of your own.

    Returns:
        The adapter; ``adapt(sae).reconstruct(x)`` equals ``sae.forward(x)``.

    Raises:
        CertifyError: If the architecture or a setting cannot be certified, or a weight is not
            finite; the message names it.
    """
    try:
        architecture = sae.cfg.architecture()
    except AttributeError:
        raise CertifyError(
            f"not a SAELens SAE: {type(sae).__name__} has no cfg.architecture(); pass an object "
            "from SAE.from_pretrained or SAE.load_from_disk, a folder, or 'release/sae_id'"
        ) from None
    check_architecture(architecture)
    if getattr(sae, "use_error_term", False):
        raise CertifyError(
            "the SAE has use_error_term=True, which adds back everything it fails to explain; "
            "set sae.use_error_term = False to certify the reconstruction"
        )
    check_config(sae.cfg)
    _check_finite(sae)
    with torch.no_grad():
        return BUILDERS.get(architecture, _own_codec)(sae)


def check_architecture(architecture: str) -> None:
    """Check that SAEs of this architecture can be certified.

    Raises:
        CertifyError: With the reason and the way out, if they cannot.
    """
    if architecture in _REFUSED:
        raise CertifyError(
            f"SAE architecture {architecture!r} cannot be certified: {_REFUSED[architecture]}"
        )


def check_config(config: Any) -> None:
    """Check everything about an SAE's configuration that needs neither weights nor a model.

    Args:
        config: ``sae.cfg``.

    Raises:
        CertifyError: Naming the setting, its value and the remedy.
    """
    input_and_output_hook(config)
    if config.normalize_activations != "constant_scalar_rescale":  # temporal SAEs' own mode
        check_mode(config.normalize_activations)
    k = getattr(config, "k", None)
    if k is not None and not 1 <= k <= config.d_sae:
        raise CertifyError(
            f"the SAE's k = {k} cannot be kept of its {config.d_sae} features; correct k in cfg.json"
        )
    for name in ("hook_head_index", "hook_head_index_out"):
        if getattr(config.metadata, name, None) is not None:
            raise CertifyError(
                f"the SAE's metadata has {name} = {getattr(config.metadata, name)}: it explains one "
                "head only, and what the other heads say would pass for its own work. Certify an SAE "
                "of all heads"
            )


def input_and_output_hook(config: Any) -> tuple[str, str]:
    """Return the hook whose activation is encoded and the one whose activation is replaced.

    Args:
        config: ``sae.cfg``.

    Raises:
        CertifyError: If the metadata has no hook.
    """
    metadata = config.metadata
    if metadata is None or not metadata.hook_name:
        raise CertifyError(
            "the SAE's metadata has no hook_name, so nobody knows which activation it explains; "
            "set sae.cfg.metadata.hook_name, e.g. 'blocks.6.hook_resid_post'"
        )
    hook = str(metadata.hook_name)
    # SAELens registers some transcoders on the residual before the norm, although they were trained
    # on the norm's output, which only the Hugging Face name tells.
    after_norm = re.fullmatch(r".*layernorm\.output", metadata.hf_hook_name or "")
    if hook.endswith(".hook_mlp_in") and after_norm:
        hook = hook.removesuffix("hook_mlp_in") + "mlp.hook_in"
    output = metadata.hook_name_out or hook
    if not metadata.hook_name_out and "transcoder" in config.architecture():
        raise CertifyError(
            "the transcoder's metadata has no hook_name_out, so nobody knows which activation it "
            "replaces; set sae.cfg.metadata.hook_name_out, e.g. 'blocks.6.hook_mlp_out'"
        )
    return hook, output


def _standard(sae: Any) -> SAEAdapter:
    return _fused(sae)


def _topk(sae: Any) -> FusedAdapter:
    decoder = _rows(sae.W_dec)
    scale = None
    if sae.cfg.rescale_acts_by_decoder_norm:
        # SAELens ranks by the score times the decoder norm and divides it out when decoding.
        scale = decoder.float().norm(dim=-1)
        if not bool(scale.all()):
            raise CertifyError(
                f"W_dec row {int((scale == 0).nonzero()[0])} is zero, and rescale_acts_by_decoder_norm "
                "divides by the norms of the rows: SAELens returns NaN for this SAE"
            )
        decoder = decoder.float() / scale[:, None]
    return _fused(sae, k=int(sae.cfg.k), score_scale=scale, decoder=decoder)


def _abstopk(sae: Any) -> SAEAdapter:
    return dataclasses.replace(_topk(sae), signed=True)


def _jumprelu(sae: Any) -> SAEAdapter:
    # relu(p) [p > theta] is active exactly when p is above both 0 and theta.
    return _fused(sae, theta=sae.threshold.detach().float().clamp(min=0.0))


def _gated(sae: Any) -> SAEAdapter:
    # relu(u w exp(r) + b_mag) is a score of bias b_mag exp(-r) and scale exp(r).
    scale = sae.r_mag.detach().float().exp()
    return _fused(
        sae,
        encoder_bias=sae.b_mag.detach().float() / scale,
        score_scale=scale,
        gate_bias=sae.b_gate.detach().float(),
    )


def _transcoder(sae: Any) -> SAEAdapter:
    return _fused(sae, **_of_transcoder(sae))


def _jumprelu_transcoder(sae: Any) -> SAEAdapter:
    theta = sae.threshold.detach().float().clamp(min=0.0)
    return _fused(sae, theta=theta, **_of_transcoder(sae))


def _topk_transcoder(sae: Any) -> SAEAdapter:
    return _fused(sae, k=int(sae.cfg.k), **_of_transcoder(sae))


def _of_transcoder(sae: Any) -> dict[str, Any]:
    skip = getattr(sae, "W_skip", None)
    return {
        "input_bias": None,
        "undo_normalization": False,
        "skip": None if skip is None else skip.detach(),
    }


def _fused(sae: Any, **parts: Any) -> FusedAdapter:
    """Build an adapter from the parameters that most architectures share; ``parts`` take their place."""
    b_dec = sae.b_dec.detach().float()
    decoder = parts.pop("decoder", None)
    decoder = _rows(sae.W_dec) if decoder is None else decoder
    if "encoder_bias" not in parts:
        parts["encoder_bias"] = sae.b_enc.detach().float()
    if "input_bias" not in parts:
        parts["input_bias"] = b_dec if sae.cfg.apply_b_dec_to_input else None
    return FusedAdapter(
        **_names(sae),
        d_in=sae.W_enc.shape[0],
        d_sae=decoder.shape[0],
        d_out=decoder.shape[1],
        encoder=_rows(sae.W_enc.T),
        decoder=decoder,
        decoder_bias=b_dec,
        normalization=check_mode(sae.cfg.normalize_activations),
        **parts,
    )


def _matching_pursuit(sae: Any) -> SAEAdapter:
    mode = check_mode(sae.cfg.normalize_activations)

    def dense(sae: Any, x: Tensor) -> DenseCodes:
        return sae.encode(x), normalize(x.float().flatten(0, 1), mode)[1]

    bias = sae.b_dec.detach().float() if sae.cfg.apply_b_dec_to_input else None
    return _own_encoder(sae, dense, bias)


def _temporal(sae: Any) -> SAEAdapter:
    """Novel codes are the features; what is predicted from context is added beside them."""

    def dense(sae: Any, x: Tensor) -> DenseCodes:
        novel, predicted = sae.encode_with_predictions(x)
        shift = (predicted @ sae.W_dec).flatten(0, 1).float()
        undo: TokenMap | None
        if sae.cfg.normalize_activations == "constant_scalar_rescale":
            factor = float(sae.cfg.activation_normalization_factor)
            undo = TokenMap(scale=torch.full_like(shift[:, :1], 1 / factor))
        else:
            _, undo = normalize(x.float().flatten(0, 1), check_mode(sae.cfg.normalize_activations))
        if undo is None:
            return novel, TokenMap(shift=shift)
        return novel, TokenMap(undo.scale, undo.apply(shift))

    has_bias = not sae.cfg.tied_weights or sae.cfg.apply_b_dec_to_input
    return _own_encoder(sae, dense, sae.b_dec.detach().float() if has_bias else None)


def _groupmax(sae: Any) -> SAEAdapter:
    is_transcoder = "transcoder" in sae.cfg.architecture()
    mode = check_mode(sae.cfg.normalize_activations)
    skip = getattr(sae, "W_skip", None)

    def dense(sae: Any, x: Tensor) -> DenseCodes:
        raw = x.flatten(0, 1).float()
        if skip is not None:
            return sae.encode(x), TokenMap(shift=raw @ skip.detach().float().T)
        return sae.encode(x), None if is_transcoder else normalize(raw, mode)[1]

    return _own_encoder(sae, dense, sae.b_dec.detach().float())


def _own_encoder(
    sae: Any, dense: Callable[[Any, Tensor], DenseCodes], bias: Tensor | None
) -> OwnEncoderAdapter:
    decoder = _rows(sae.W_dec)
    return OwnEncoderAdapter(
        **_names(sae),
        d_in=int(sae.cfg.d_in),
        d_sae=decoder.shape[0],
        d_out=decoder.shape[1],
        decoder=decoder,
        decoder_bias=bias,
        sae=working_copy(sae),
        dense=dense,
    )


def _own_codec(sae: Any) -> SAEAdapter:
    """An architecture that this package does not know: its own encode and decode."""
    mode = check_mode(sae.cfg.normalize_activations)
    d_in, d_sae = int(sae.cfg.d_in), int(sae.cfg.d_sae)
    d_out = int(getattr(sae.cfg, "d_out", d_in))
    rows = getattr(sae, "W_dec", None)
    has_rows = isinstance(rows, Tensor) and tuple(rows.shape) == (d_sae, d_out)

    def dense(sae: Any, x: Tensor) -> DenseCodes:
        return sae.encode(x), normalize(x.float().flatten(0, 1), mode)[1]

    return OwnCodecAdapter(
        **_names(sae),
        d_in=d_in,
        d_sae=d_sae,
        d_out=d_out,
        decoder=_rows(rows) if has_rows and rows is not None else None,
        decoder_bias=None,
        sae=working_copy(sae),
        dense=dense,
    )


def _names(sae: Any) -> dict[str, Any]:
    input_hook, output_hook = input_and_output_hook(sae.cfg)
    return {
        "architecture": sae.cfg.architecture(),
        "input_hook": input_hook,
        "output_hook": output_hook,
        "config": sae.cfg.to_dict(),
    }


def _rows(weight: Tensor) -> Tensor:
    weight = weight.detach()
    # Kernels take up to float32; scores are accumulated in float64 all the same.
    return (weight.float() if weight.dtype == torch.float64 else weight).contiguous()


def _check_finite(sae: Any) -> None:
    for name, parameter in sae.named_parameters():
        if parameter.is_meta:
            raise CertifyError(
                f"SAE weight {name} is on the device 'meta', which holds no numbers; load the SAE first"
            )
        bad = int((~torch.isfinite(parameter)).sum())
        if bad:
            raise CertifyError(
                f"SAE weight {name} has {bad} values that are NaN or infinite (of "
                f"{parameter.numel()}); the checkpoint is damaged or was trained to divergence"
            )


BUILDERS: dict[str, Callable[[Any], SAEAdapter]] = {
    "standard": _standard,
    "topk": _topk,
    "abstopk": _abstopk,
    "jumprelu": _jumprelu,
    "gated": _gated,
    "transcoder": _transcoder,
    "skip_transcoder": _transcoder,
    "jumprelu_transcoder": _jumprelu_transcoder,
    "jumprelu_skip_transcoder": _jumprelu_transcoder,
    "topk_transcoder": _topk_transcoder,
    "topk_skip_transcoder": _topk_transcoder,
    "groupmax": _groupmax,
    "groupmax_transcoder": _groupmax,
    "groupmax_skip_transcoder": _groupmax,
    "matching_pursuit": _matching_pursuit,
    "temporal": _temporal,
}

_REFUSED = {
    name: (
        f"a {kind} SAE in its training form ranks features over the whole batch, so a sequence's codes "
        "depend on its neighbours; save it with sae.save_inference_model(folder) and certify the "
        "saved form"
    )
    for name, kind in (("batchtopk", "BatchTopK"), ("matryoshka_batchtopk", "Matryoshka"))
}
