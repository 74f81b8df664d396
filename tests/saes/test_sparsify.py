"""sparsify checkpoints become SAELens objects that compute the same."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sae_lens import SAE
from sae_lens.registry import SAE_CLASS_REGISTRY
from safetensors.torch import load_file, save_file
from torch import Tensor

from saelens_certify.errors import CertifyError
from saelens_certify.saes import adapt, load_sparsify
from saelens_certify.saes.classes import OWN_CLASSES, register_with_sae_lens
from saelens_certify.saes.classes.groupmax import GroupMax
from saelens_certify.saes.configurations import check_source
from saelens_certify.saes.sparsify import is_sparsify_folder, sparsify_config
from saes.sparsify_files import FORWARDS, WRITERS, Checkpoint, checkpoint, inputs, write

KINDS = {
    "autoencoder": {},
    "autoencoder, decoder not normalised": {"normalize_decoder": False},
    "multi-topk": {"multi_topk": True},
    "one feature": {"k": 1},
    "all features": {"k": 64},
    "num_latents": {"num_latents": 40},
    "autoencoder with skip": {"skip_connection": True},
    "groupmax": {"activation": "groupmax"},
    "groupmax, 16 groups": {"activation": "groupmax", "k": 16},
    "transcoder": {"transcode": True},
    "transcoder, decoder not normalised": {"transcode": True, "normalize_decoder": False},
    "skip transcoder": {"transcode": True, "skip_connection": True},
    "groupmax transcoder": {"transcode": True, "activation": "groupmax"},
    "groupmax skip transcoder": {
        "transcode": True, "skip_connection": True, "activation": "groupmax",
    },
}  # fmt: skip
ARCHITECTURES = {
    ("topk", False, False): "topk",
    ("topk", True, False): "topk_transcoder",
    ("topk", True, True): "topk_skip_transcoder",
    ("topk", False, True): "topk_skip_transcoder",
    ("groupmax", False, False): "groupmax",
    ("groupmax", True, False): "groupmax_transcoder",
    ("groupmax", True, True): "groupmax_skip_transcoder",
}


def load(coder: Checkpoint, folder: Path, **options: Any) -> Any:
    return load_sparsify(write(coder, folder / "layers.1.mlp"), **options)


@torch.no_grad()
def relative_error(found: Tensor, expected: Tensor) -> Tensor:
    return (found.double() - expected.double()).norm(dim=-1) / expected.double().norm(dim=-1)


@pytest.mark.parametrize("writer", WRITERS)
@pytest.mark.parametrize("kind", KINDS)
def test_forward_is_sparsifys(kind: str, writer: str, tmp_path: Path) -> None:
    coder = checkpoint(**KINDS[kind])
    sae = load_sparsify(WRITERS[writer](coder, tmp_path / "layers.1.mlp"))
    config = coder.config
    architecture = ARCHITECTURES[
        config["activation"], config["transcode"], config["skip_connection"]
    ]
    assert sae.cfg.architecture() == architecture
    x = inputs(50)
    for forward in FORWARDS.values():
        assert relative_error(sae(x), forward(coder, x)).max() < 1e-5
    latents = coder.latents(x)
    assert (latents.count_nonzero(dim=-1) <= config["k"]).all()
    torch.testing.assert_close(sae.encode(x).double(), latents, atol=1e-5, rtol=1e-5)
    # Whole sequences, as SAELens calls it.
    torch.testing.assert_close(sae(x.reshape(5, 10, 16)).reshape(50, 16), sae(x))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_dtype_of_the_checkpoint_is_kept(kind: str, dtype: torch.dtype, tmp_path: Path) -> None:
    coder = checkpoint(**KINDS[kind], dtype=dtype)
    if kind == "autoencoder with skip" and dtype != torch.float64:
        with pytest.raises(CertifyError, match="dtype='float32'"):
            load(coder, tmp_path)
        sae, dtype = load(coder, tmp_path, dtype="float32"), torch.float32
    else:
        sae = load(coder, tmp_path)
    assert {parameter.dtype for parameter in sae.parameters()} == {dtype} == {sae.dtype}
    assert sae.cfg.dtype == str(dtype).removeprefix("torch.")
    # Rounding may select another feature where two scores nearly tie; those tokens say nothing.
    x = inputs(150).to(dtype)
    tolerance = {torch.bfloat16: 0.03, torch.float16: 0.004}.get(dtype, 1e-6)
    clear = x if kind == "all features" else x[coder.margin(x) > tolerance]
    assert len(clear) > 10
    for x in (clear, clear.float()):
        assert relative_error(sae(x), coder.forward(x)).max() < tolerance


@pytest.mark.parametrize("dtype", ["bfloat16", torch.float64])
def test_dtype_can_be_chosen(dtype: Any, tmp_path: Path) -> None:
    coder = checkpoint()
    sae = load(coder, tmp_path, dtype=dtype)
    wanted = getattr(torch, dtype) if isinstance(dtype, str) else dtype
    assert torch.equal(sae.W_dec, coder.tensors["W_dec"].to(wanted))


def test_decoder_is_not_transposed_where_no_shape_tells(tmp_path: Path) -> None:
    coder = checkpoint(expansion_factor=1)
    sae = load(coder, tmp_path)
    assert torch.equal(sae.W_dec, coder.tensors["W_dec"])
    assert torch.equal(sae.W_enc, coder.tensors["encoder.weight"].T)


def test_signed_checkpoints_keep_negative_features(tmp_path: Path) -> None:
    # Of 2024, before the package had the name sparsify: ranked by size, sign kept.
    coder = checkpoint(signed=True)
    sae = load(coder, tmp_path)
    x = inputs(50)
    assert (sae.encode(x) < 0).any()
    assert relative_error(sae(x), coder.forward(x)).max() < 1e-5


def test_old_configs_without_later_settings(tmp_path: Path) -> None:
    coder = checkpoint()
    folder = write(coder, tmp_path / "layers.1")
    kept = {key: coder.config[key] for key in ("d_in", "expansion_factor", "k")}
    (folder / "cfg.json").write_text(json.dumps(kept))
    x = inputs(20)
    assert relative_error(load_sparsify(folder)(x), coder.forward(x)).max() < 1e-5


@given(
    d_in=st.integers(1, 12),
    groups=st.integers(1, 5),
    size=st.integers(1, 4),
    activation=st.sampled_from(["topk", "groupmax"]),
    transcode=st.booleans(),
    skip=st.booleans(),
    seed=st.integers(0, 2**20),
)
@settings(
    max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
def test_any_shape_converts(
    tmp_path: Path, d_in: int, groups: int, size: int, activation: str, transcode: bool,
    skip: bool, seed: int,
) -> None:  # fmt: skip
    coder = checkpoint(
        d_in, seed=seed, num_latents=groups * size, k=groups, activation=activation,
        transcode=transcode, skip_connection=skip,
    )  # fmt: skip
    x = inputs(7, d_in, seed)
    found = load(coder, tmp_path)(x).detach().double()
    assert torch.allclose(found, coder.forward(x), atol=1e-4, rtol=1e-4)


@given(k=st.integers(1, 6), size=st.integers(1, 6), n=st.integers(0, 5), seed=st.integers(0, 2**20))
def test_groupmax_keeps_the_largest_of_each_group(k: int, size: int, n: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, k * size, generator=generator)
    kept = GroupMax(k)(x)
    groups, before = kept.unflatten(-1, (k, size)), x.unflatten(-1, (k, size))
    assert torch.equal(groups.amax(dim=-1), before.amax(dim=-1).relu())
    assert (groups.count_nonzero(dim=-1) <= 1).all()
    assert ((kept == x) | (kept == 0)).all()


@pytest.mark.parametrize(("activation", "transcode", "skip"), ARCHITECTURES)
def test_saved_objects_load_again(
    activation: str, transcode: bool, skip: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    registry = dict(SAE_CLASS_REGISTRY)
    coder = checkpoint(activation=activation, transcode=transcode, skip_connection=skip)
    sae = load(coder, tmp_path)
    sae.save_model(tmp_path / "saved")
    again = OWN_CLASSES.get(sae.cfg.architecture(), SAE).load_from_disk(tmp_path / "saved")
    assert type(again) is type(sae)
    assert again.cfg.to_dict() == sae.cfg.to_dict()
    x = inputs(9)
    assert torch.equal(again(x), sae(x))
    # Nobody asked for SAELens's table to be changed.
    assert registry == SAE_CLASS_REGISTRY
    for architecture in OWN_CLASSES:  # entries that the next call adds, to be taken out again
        monkeypatch.setitem(SAE_CLASS_REGISTRY, architecture, (object, object))
        monkeypatch.delitem(SAE_CLASS_REGISTRY, architecture)
    register_with_sae_lens()
    register_with_sae_lens()
    assert torch.equal(SAE.load_from_disk(tmp_path / "saved")(x), sae(x))


def test_registering_replaces_nobodys_class(monkeypatch: pytest.MonkeyPatch) -> None:
    theirs = SAE_CLASS_REGISTRY["transcoder"]
    monkeypatch.setitem(SAE_CLASS_REGISTRY, "groupmax", theirs)
    before = dict(SAE_CLASS_REGISTRY)
    with pytest.raises(CertifyError, match=r"groupmax.*Transcoder"):
        register_with_sae_lens()
    assert before == SAE_CLASS_REGISTRY


def test_own_classes_load_only_what_is_theirs(tmp_path: Path) -> None:
    load(checkpoint(transcode=True), tmp_path).save_model(tmp_path / "saved")
    with pytest.raises(CertifyError, match="topk_transcoder"):
        OWN_CLASSES["groupmax"].load_from_disk(tmp_path / "saved")


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind not in ("all features",)])
def test_selection_forbids_folding_decoder_norms(kind: str, tmp_path: Path) -> None:
    with pytest.raises(NotImplementedError):
        load(checkpoint(**KINDS[kind]), tmp_path).fold_W_dec_norm()


@pytest.mark.parametrize("kind", KINDS)
def test_adapter_agrees(kind: str, tmp_path: Path) -> None:
    coder = checkpoint(**KINDS[kind])
    adapter = adapt(load(coder, tmp_path))
    x = inputs(60)
    assert relative_error(adapter.reconstruct(x), coder.forward(x)).max() < 1e-5
    features = adapter.encode(x).features.to_dense(adapter.d_sae)
    torch.testing.assert_close(features.double(), coder.latents(x), atol=1e-5, rtol=1e-5)
    assert (adapter.input_hook != adapter.output_hook) == coder.config["transcode"]


def test_metadata(tmp_path: Path) -> None:
    run = {"sae": {}, "model": "EleutherAI/pythia-14m", "dataset": "some/text", "ctx_len": 512}
    (tmp_path / "config.json").write_text(json.dumps(run))
    sae = load(checkpoint(transcode=True), tmp_path)
    metadata = sae.cfg.metadata
    assert metadata.model_name == "EleutherAI/pythia-14m"
    assert (metadata.dataset_path, metadata.context_size) == ("some/text", 512)
    assert metadata.sparsify_hookpoint == "layers.1.mlp"
    assert metadata.sparsify_config["k"] == 4
    json.dumps(sae.cfg.to_dict())
    assert load(checkpoint(), tmp_path, model_name="gpt2").cfg.metadata.model_name == "gpt2"
    assert load(checkpoint(), tmp_path).cfg.metadata.hook_name_out is None


@pytest.mark.parametrize("kind", KINDS)
def test_configuration_without_weights(kind: str, tmp_path: Path) -> None:
    folder = write(checkpoint(**KINDS[kind]), tmp_path / "layers.1.mlp")
    expected = load_sparsify(folder).cfg
    # As an audit does before it starts; an unreadable file shows that it is not read.
    (folder / "sae.safetensors").write_bytes(b"")
    assert check_source(folder)[0].to_dict() == expected.to_dict()
    (folder / "sae.safetensors").unlink()
    config = sparsify_config(folder)
    assert type(config) is type(expected)
    assert config.to_dict() == expected.to_dict()
    with pytest.raises(CertifyError, match="pass hookpoint="):
        sparsify_config(folder, hookpoint="nowhere")


def test_hookpoint_comes_from_the_folder_or_the_caller(tmp_path: Path) -> None:
    seeded = write(checkpoint(), tmp_path / "h.3" / "seed12")
    assert load_sparsify(seeded).cfg.metadata.hook_name == "blocks.3.hook_resid_post"
    unnamed = write(checkpoint(), tmp_path / "my-sae")
    with pytest.raises(CertifyError, match=r"my-sae.*pass hookpoint="):
        load_sparsify(unnamed)
    sae = load_sparsify(str(unnamed), hookpoint="layers.0.attn")
    assert sae.cfg.metadata.hook_name == "blocks.0.hook_attn_out"
    link = tmp_path / "layers.7"
    link.symlink_to(unnamed)
    assert load_sparsify(link).cfg.metadata.hook_name == "blocks.7.hook_resid_post"


def test_what_a_sparsify_folder_is(tmp_path: Path) -> None:
    folder = write(checkpoint(), tmp_path / "layers.0")
    assert is_sparsify_folder(folder)
    assert is_sparsify_folder(str(folder))
    load_sparsify(folder).save_model(tmp_path / "saved")
    assert not is_sparsify_folder(tmp_path / "saved")
    assert not is_sparsify_folder(tmp_path)
    assert not is_sparsify_folder(tmp_path / "nowhere")


BAD_SETTINGS = {
    "k = 0": {"k": 0},
    "k = 'four'": {"k": "four"},
    "k = 65": {"k": 65},
    "num_latents = -1": {"num_latents": -1},
    "activation 'softmax'": {"activation": "softmax"},
    "k = 3 cannot be made equal groups": {"activation": "groupmax", "k": 3},
    "signed=true is known for": {"signed": True, "transcode": True},
    "gram_lookup": {"gram_lookup": True},
    "expected.*found": {"num_latents": 63},
    "W_skip": {"skip_connection": True},
    "d_in = None": {"d_in": None},
}


@pytest.mark.parametrize("message", BAD_SETTINGS)
def test_settings_that_cannot_be_served_are_named(message: str, tmp_path: Path) -> None:
    coder = checkpoint()
    folder = write(coder, tmp_path / "layers.0")
    (folder / "cfg.json").write_text(json.dumps({**coder.config, **BAD_SETTINGS[message]}))
    with pytest.raises(CertifyError, match=message):
        load_sparsify(folder)
    if message not in ("expected.*found", "W_skip"):  # which only the weights contradict
        with pytest.raises(CertifyError, match=message):
            sparsify_config(folder)


def test_settings_without_effect_are_accepted(tmp_path: Path) -> None:
    coder = checkpoint()
    folder = write(coder, tmp_path / "layers.0")
    later = {
        "gram_lookup": False,
        "embed_skip": False,
        "lookup_max_order": 4,
        "gram_table_hash": None,
    }
    (folder / "cfg.json").write_text(json.dumps({**coder.config, **later}))
    assert torch.equal(load_sparsify(folder).W_dec, coder.tensors["W_dec"])


def test_damaged_files_are_named(tmp_path: Path) -> None:
    folder = write(checkpoint(), tmp_path / "layers.0")
    weights, config = folder / "sae.safetensors", folder / "cfg.json"
    good_weights, good_config = weights.read_bytes(), config.read_text()
    weights.write_bytes(good_weights[: len(good_weights) // 2])
    with pytest.raises(CertifyError, match=r"sae\.safetensors cannot be read"):
        load_sparsify(folder)
    weights.write_bytes(good_weights)
    for broken in ("{", "[1]"):
        config.write_text(broken)
        with pytest.raises(CertifyError, match=r"cfg\.json"):
            load_sparsify(folder)
    config.write_text(good_config)
    save_file({**load_file(weights), "extra": torch.ones(1)}, weights)
    with pytest.raises(CertifyError, match="extra"):
        load_sparsify(folder)
    weights.unlink()
    with pytest.raises(CertifyError, match=r"no sae\.safetensors"):
        load_sparsify(folder)


def test_dtypes_that_cannot_be_served_are_named(tmp_path: Path) -> None:
    folder = write(checkpoint(), tmp_path / "layers.0")
    with pytest.raises(CertifyError, match="int8"):
        load_sparsify(folder, dtype="int8")
    tensors = load_file(folder / "sae.safetensors")
    save_file({**tensors, "b_dec": tensors["b_dec"].bfloat16()}, folder / "sae.safetensors")
    with pytest.raises(CertifyError, match=r"mixes dtypes.*bfloat16.*float32"):
        load_sparsify(folder)
    assert load_sparsify(folder, dtype="float32").b_dec.dtype == torch.float32
    save_file({**tensors, "b_dec": tensors["b_dec"].int()}, folder / "sae.safetensors")
    with pytest.raises(CertifyError, match="int32"):
        load_sparsify(folder)
