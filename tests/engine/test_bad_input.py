"""Wrong input is refused before the model runs, in words that name the value and the remedy."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from sae_lens import BatchTopKTrainingSAE, BatchTopKTrainingSAEConfig
from sae_lens.saes.sae import SAEMetadata

from engine.builders import (
    D_VOCAB,
    SEQ_LEN,
    hooked_transformer,
    llama_bridge,
    make_sae,
    make_tokens,
)
from saelens_certify import CertifyConfig, CertifyError, certify, check_configs

CONFIG = CertifyConfig(seq_len=SEQ_LEN, progress=False)


def run(sae=None, calibration=None, evaluation=None, config=CONFIG, model=None, forward=False):
    """Certify; unless ``forward``, any forward pass of the model fails the test."""
    model = model or hooked_transformer()
    calls: list[int] = []
    handle = model.blocks[0].register_forward_hook(lambda *_: calls.append(1))
    try:
        certify(
            model,
            make_sae() if sae is None else sae,
            calibration=make_tokens(20, seed=1) if calibration is None else calibration,
            evaluation=make_tokens(20, seed=2) if evaluation is None else evaluation,
            config=config,
        )
    finally:
        handle.remove()
        assert forward or not calls, "the model ran before the error"


def refuses(match: str, **kwargs) -> None:
    with pytest.raises(CertifyError, match=match):
        run(**kwargs)


def test_wrong_hook_name_suggests_near_ones() -> None:
    refuses(
        r"no hook 'blocks.9.hook_resid_post'.*3 layers.*blocks\.\d",
        sae=make_sae(hook="blocks.9.hook_resid_post"),
    )


def test_hook_that_does_not_fire() -> None:
    refuses("did not fire.*hook_mlp_in", sae=make_sae(hook="blocks.1.hook_mlp_in"), forward=True)


def test_missing_hook_name() -> None:
    sae = make_sae()
    sae.cfg.metadata.hook_name = None
    refuses("no hook_name", sae=sae)


def test_widths_that_differ() -> None:
    refuses("width 48.*width 32", sae=make_sae(d_in=48))
    refuses("width 64.*expects 32", sae=make_sae(hook="blocks.1.mlp.hook_post"), forward=True)


def test_sae_of_another_model() -> None:
    sae = make_sae()
    sae.cfg.metadata.model_name = "gpt2-small"
    model = hooked_transformer(model_name="pythia-70m")
    refuses("trained on 'gpt2-small', the model is 'pythia-70m'", sae=sae, model=model)
    sae.cfg.metadata.model_name = "EleutherAI/pythia-70m"
    run(sae, model=model, forward=True)


def test_token_ids_outside_the_vocabulary() -> None:
    tokens = make_tokens(20, seed=2)
    tokens[3, 4] = D_VOCAB
    refuses(rf"{D_VOCAB}", evaluation=tokens)


@pytest.mark.parametrize("side", ["calibration", "evaluation"])
def test_empty_or_short_documents(side) -> None:
    refuses("document|sequence", **{side: torch.zeros(0, SEQ_LEN, dtype=torch.int64)})
    refuses(r"\b12\b", **{side: make_tokens(20, seed=2)[:, :5]})


def test_overlap_of_calibration_and_evaluation() -> None:
    both = make_tokens(20, seed=1)
    refuses("2", evaluation=torch.cat([make_tokens(10, seed=2), both[:2]]))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_weights_that_are_not_finite(bad) -> None:
    sae = make_sae()
    sae.W_enc.data[3, 4] = bad
    refuses("W_enc has 1 values that are NaN or infinite", sae=sae)


def test_attached_hooks_are_refused() -> None:
    model: Any = hooked_transformer()
    sae = make_sae()
    model.add_hook("blocks.2.hook_mlp_out", lambda x, hook: x * 0)  # noqa: ARG005
    try:
        refuses("attached at 'blocks.2.hook_mlp_out'", model=model)
    finally:
        model.reset_hooks(including_permanent=True)
    sae.add_hook("hook_sae_acts_post", lambda x, hook: x * 0)  # noqa: ARG005
    refuses("attached at 'hook_sae_acts_post'", sae=sae)


def test_sequences_longer_than_the_context() -> None:
    refuses("seq_len = 65 .*64", config=CertifyConfig(seq_len=65, progress=False))


def test_autocast_is_refused() -> None:
    with torch.autocast("cpu", torch.bfloat16):
        refuses("autocast")


def test_resid_mid_on_a_bridge_is_refused() -> None:
    """There the name means the input of the MLP branch: another experiment."""
    refuses("MLP branch only", model=llama_bridge(), sae=make_sae(hook="blocks.1.hook_resid_mid"))


def test_switched_off_hook_on_a_bridge() -> None:
    refuses("did not fire", model=llama_bridge(), sae=make_sae(hook="blocks.1.hook_mlp_in"))


def _add_noise(_module: Any, _inputs: Any, output: Any) -> Any:
    return output + torch.randn_like(output)


def test_models_that_are_not_deterministic() -> None:
    """Dropout that is no module: two passes differ."""
    model: Any = hooked_transformer(n_layers=2)
    noise = model.blocks[0].register_forward_hook(_add_noise)
    try:
        refuses("something else every time", model=model, forward=True)
    finally:
        noise.remove()


def test_error_term_is_refused() -> None:
    sae = make_sae()
    with pytest.warns(DeprecationWarning, match="use_error_term"):
        sae.use_error_term = True
    refuses("use_error_term", sae=sae)


@pytest.mark.parametrize("mode", ["expected_average_only_in", "covariance_whitening"])
def test_unfolded_normalisation_is_refused(mode) -> None:
    sae = make_sae()
    sae.cfg.normalize_activations = mode
    refuses(mode, sae=sae)


def test_hooks_after_the_last_block() -> None:
    for model in (hooked_transformer(), llama_bridge()):
        refuses("after the last block", model=model, sae=make_sae(hook="ln_final.hook_normalized"))


def test_saes_that_cannot_be_adapted() -> None:
    too_many = make_sae()
    too_many.cfg.k = 1000
    refuses("k = 1000 cannot be kept of its 96 features", sae=too_many)
    nameless = make_sae()
    nameless.cfg.metadata = None
    refuses("no hook_name", sae=nameless)
    refuses("device 'meta'", sae=make_sae().to("meta"))


def test_positions_of_training_are_told() -> None:
    sae = make_sae()
    sae.cfg.metadata.seqpos_slice = (None, -2)
    with pytest.warns(UserWarning, match=r"seqpos_slice = \(None, -2\)"):
        run(sae=sae, forward=True)


def test_training_form_batchtopk_is_refused() -> None:
    sae = BatchTopKTrainingSAE(
        BatchTopKTrainingSAEConfig(
            d_in=32, d_sae=96, k=8, metadata=SAEMetadata(hook_name="blocks.1.hook_resid_post")
        )
    )
    refuses("save_inference_model", sae=sae)


def test_things_that_are_no_sae_or_model() -> None:
    refuses("not a SAELens SAE", sae=torch.nn.Linear(2, 2))
    with pytest.raises(CertifyError, match="HookedTransformer"):
        certify(torch.nn.Linear(2, 2), make_sae(), calibration=[], evaluation=[], config=CONFIG)
    refuses("neither an existing folder", sae="nonsense")
    refuses(
        "no release 'gpt2-small-res-jbx'.*gpt2-small-res-jb",
        sae="gpt2-small-res-jbx/blocks.6.hook_resid_pre",
    )
    refuses("has no SAE 'blocks.66", sae="gpt2-small-res-jb/blocks.66.hook_resid_pre")


def test_folder_without_config(tmp_path) -> None:
    (tmp_path / "layer_1").mkdir()
    (tmp_path / "layer_1" / "cfg.json").write_text("{}")
    refuses("no cfg.json; it holds SAE folders layer_1", sae=str(tmp_path))


@pytest.mark.parametrize(
    ("field", "value", "match"),
    [
        ("coding", "top64", "unknown coding rule 'top64'"),
        ("coding", "topk:0", "unknown coding rule"),
        ("alpha", 0.0, "alpha must lie strictly between 0 and 1, got 0.0"),
        ("alpha", 1.0, "alpha"),
        ("delta", -0.1, "delta must lie strictly between 0 and 1, got -0.1"),
        ("delta", float("nan"), "delta"),
        ("seq_len", 1, "seq_len must be an integer of at least 2, got 1"),
        ("tau", 0, "tau"),
        ("positions", "most", "positions must be one of"),
        ("impl", "cuda", "impl must be one of"),
        ("permutations", -1, "permutations"),
        ("batch_tokens", 2.5, "batch_tokens"),
        ("seed", "x", "seed"),
        ("matched_permutations", -1, "matched_permutations must be an integer of at least 0"),
        ("random_decoders", True, "random_decoders must be an integer of at least 0, got True"),
        ("progress", 1, "progress must be True or False, got 1"),
    ],
)
def test_settings_out_of_range(field, value, match) -> None:
    with pytest.raises(CertifyError, match=match):
        CertifyConfig(**{field: value})


def test_numbers_of_other_kinds_are_taken() -> None:
    numbers: dict[str, Any] = {
        "seq_len": np.int64(16),
        "delta": np.float32(0.25),
        "seed": np.int32(3),
    }
    config = CertifyConfig(**numbers)
    assert config.to_dict() == CertifyConfig(seq_len=16, delta=0.25, seed=3).to_dict()


@pytest.mark.parametrize("given", [{"seq_len": 12}, {}, "native"])
def test_settings_that_are_no_config(given: Any) -> None:
    refuses(r"config must be a CertifyConfig, got (dict|str); .*from_dict", config=given)
    for saes in ([make_sae()], []):
        with pytest.raises(CertifyError, match="config must be a CertifyConfig"):
            check_configs(saes, hooked_transformer(), given)


def test_unknown_setting() -> None:
    with pytest.raises(CertifyError, match="gamma"):
        CertifyConfig.from_dict({"gamma": 1})


def test_empty_pool() -> None:
    refuses(
        "no feature was active on 100000 or more",
        config=CertifyConfig(seq_len=SEQ_LEN, tau=100000, progress=False),
        forward=True,
    )


def test_sae_that_its_adapter_does_not_reproduce() -> None:
    """A subclass that changes forward would get a certificate about another function."""
    sae = make_sae()
    decode = type(sae).decode
    sae.decode = lambda acts: decode(sae, acts) * 1.01
    refuses("does not reproduce this SAE", sae=sae, forward=True)


def test_missing_bos_is_pointed_out() -> None:
    tokens = make_tokens(40, seed=5)
    tokens[:, 0] = torch.randint(2, 90, (40,), generator=torch.Generator().manual_seed(0))
    model = hooked_transformer(default_prepend_bos=True)
    with pytest.warns(UserWarning, match="do not begin with BOS"):
        run(calibration=tokens[:20], evaluation=tokens[20:], model=model, forward=True)
