"""What is refused from configurations alone: before weights are fetched, all of it at once."""

from __future__ import annotations

import json
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from engine.builders import D_MODEL, N_LAYERS, hooked_transformer, llama_bridge, make_sae
from sae_lens import SAE, BatchTopKTrainingSAE, BatchTopKTrainingSAEConfig

from saelens_certify import CertifyConfig, CertifyError
from saelens_certify.config_check import check_config, check_configs, refusals
from saelens_certify.saes.loading import open_sae
from saelens_certify.saes.sources import SAESpec, registry
from saes.hub_cache import HubCache, hub, located
from saes.sparsify_files import checkpoint, write

__all__ = ["hub"]

JB, JB_ID = "gpt2-small-res-jb", "blocks.1.hook_resid_pre"


@pytest.fixture(autouse=True)
def _no_weights(monkeypatch) -> None:
    """Configurations are enough: loading weights fails the test."""

    def fail(*_: Any, **__: Any) -> None:
        raise AssertionError("weights were loaded")

    monkeypatch.setattr(SAE, "load_from_disk", fail)
    monkeypatch.setattr(SAE, "from_pretrained", fail)
    monkeypatch.setattr("safetensors.torch.load_file", fail)


def publish(hub: HubCache, sae_id: str = JB_ID, release: str = JB, **settings: Any) -> SAESpec:
    """Publish an SAE's configuration, without its weights."""
    repository, folder = located(release, sae_id)
    config = make_sae(hook=sae_id).cfg.to_dict()
    metadata = config["metadata"] | settings.pop("metadata", {})
    hub.add(repository, f"{folder}/cfg.json", config | settings | {"metadata": metadata})
    return SAESpec(release, sae_id)


def test_a_configuration_that_fits_is_let_through(hub: HubCache) -> None:
    model = hooked_transformer()
    spec = publish(hub)
    for sae in (spec, str(spec), make_sae(), make_sae().cfg):
        check_config(sae, model, CertifyConfig())
        check_config(sae, model.cfg)
        check_config(sae)


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"architecture": "batchtopk"}, "'batchtopk' cannot be certified.*training form"),
        ({"architecture": "unheard"}, "no SAE architecture 'unheard'.*import the package"),
        ({"normalize_activations": "expected_average_only_in"}, "expected_average_only_in"),
        ({"normalize_activations": "covariance_whitening"}, "covariance_whitening"),
        ({"metadata": {"hook_name": None}}, "no hook_name"),
        ({"metadata": {"hook_head_index": 3}}, "hook_head_index = 3.*one head only"),
        ({"d_in": D_MODEL + 1}, f"width {D_MODEL + 1}.*has width {D_MODEL}"),
        ({"metadata": {"hook_name": "blocks.7.hook_resid_post"}}, f"it has {N_LAYERS} layers"),
        (
            {"metadata": {"model_name": "gpt2-small"}},
            "trained on 'gpt2-small', the model is 'pythia",
        ),
        ({"d_in": "many"}, "width many"),
    ],
)
@pytest.mark.parametrize("whole", [True, False])
def test_every_rule(hub: HubCache, settings, reason, whole) -> None:
    model = hooked_transformer(model_name="pythia-70m")
    with pytest.raises(CertifyError, match=reason):
        check_config(publish(hub, **settings), model if whole else model.cfg)


def test_sequences_longer_than_the_model_reads(hub: HubCache) -> None:
    model = hooked_transformer()
    with pytest.raises(CertifyError, match="seq_len = 65 is longer than the model's context of 64"):
        check_config(publish(hub), model.cfg, CertifyConfig(seq_len=65))
    with pytest.warns(UserWarning, match="contexts of 16 tokens.*seq_len = 32.*never saw"):
        check_config(publish(hub, metadata={"context_size": 16}), None, CertifyConfig())


def test_hooks_of_a_bridge(hub: HubCache) -> None:
    spec = publish(hub, metadata={"hook_name": "blocks.1.hook_resid_mid"})
    check_config(spec, hooked_transformer())
    with pytest.raises(CertifyError, match="MLP branch only"):
        check_config(spec, llama_bridge())
    with pytest.raises(CertifyError, match="near names: .*hook_resid_post"):
        check_config(
            publish(hub, metadata={"hook_name": "blocks.1.hook_resid_pos"}), hooked_transformer()
        )


def test_a_scale_that_saelens_folds_is_fine(hub: HubCache, monkeypatch) -> None:
    spec = publish(hub, normalize_activations="expected_average_only_in")
    assert refusals(spec)
    monkeypatch.setitem(registry()[JB].norm_scaling_factor, JB_ID, 2.0)
    assert not refusals(spec)


def test_summed_decoders_are_refused() -> None:
    release = next(n for n, e in registry().items() if "mntss_clt" in (e.conversion_func or ""))
    spec = SAESpec(release, next(iter(registry()[release].saes_map)))
    with pytest.raises(CertifyError, match="cross-layer transcoder: SAELens adds up"):
        check_config(spec)
    with pytest.raises(CertifyError, match="cross-layer transcoder"):
        open_sae(spec)


def test_cross_layer_folders_of_gemma_scope_2_are_refused(monkeypatch) -> None:
    """None is registered yet; SAELens's loader would sum them."""
    release = next(n for n, e in registry().items() if e.conversion_func == "gemma_3")
    monkeypatch.setitem(registry()[release].saes_map, "clt_3", "clt/layer_3_width_16k")
    with pytest.raises(CertifyError, match="cross-layer transcoder"):
        check_config(SAESpec(release, "clt_3"))


def test_folders(tmp_path) -> None:
    make_sae().save_model(tmp_path / "good")
    check_config(tmp_path / "good", hooked_transformer())
    training = BatchTopKTrainingSAE(BatchTopKTrainingSAEConfig(d_in=4, d_sae=8, k=2))
    training.save_model(tmp_path / "training")
    with pytest.raises(CertifyError, match="save_inference_model"):
        check_config(tmp_path / "training")
    with pytest.raises(CertifyError, match="no cfg.json; it holds SAE folders good, training"):
        check_config(str(tmp_path))
    config = json.loads((tmp_path / "good" / "cfg.json").read_text())
    config["architecture"] = "no_such"
    (tmp_path / "good" / "cfg.json").write_text(json.dumps(config))
    with pytest.raises(CertifyError, match="no SAE architecture 'no_such'"):
        check_config(tmp_path / "good")


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        ("[]", r"holds \[\], no object"),
        ("{}", "has no d_in and no d_sae"),
        ('{"architecture": "topk", "d_in": 4}', "has no d_sae"),
        ('{"d_in": 4, "d_sae": 8, "metadata": null}', "has a metadata that is no object"),
    ],
)
def test_what_a_configuration_must_hold(tmp_path, content, problem) -> None:
    (tmp_path / "cfg.json").write_text(content)
    message = rf"the cfg.json of SAE .* {problem}; it must be a JSON object with architecture, d_in"
    for read in (check_config, open_sae):
        with pytest.raises(CertifyError, match=message):
            read(tmp_path)


def test_sparsify_folders(tmp_path) -> None:
    folder = write(checkpoint(d_in=D_MODEL), tmp_path / "layers.1")
    check_config(folder, hooked_transformer())
    odd = write(checkpoint(d_in=D_MODEL), tmp_path / "layers.9")
    with pytest.raises(CertifyError, match=f"blocks.9.hook_resid_post.*{N_LAYERS} layers"):
        check_config(odd, hooked_transformer())


def test_hooks_of_a_sparsify_transcoder(tmp_path) -> None:
    """The rules of `certify`: attention's input is on a TransformerBridge only."""
    coder = checkpoint(d_in=D_MODEL, transcode=True)
    attention = write(coder, tmp_path / "layers.1.self_attn")
    check_config(attention, llama_bridge())
    with pytest.raises(CertifyError, match="is blocks.1.attn.hook_in on a TransformerBridge"):
        check_config(attention, hooked_transformer())


def test_every_failure_of_every_sae_is_named(hub: HubCache) -> None:
    ids = [f"blocks.{layer}.hook_resid_pre" for layer in range(5)]
    wrong: dict[str, Any] = {
        ids[0]: {},
        ids[1]: {"normalize_activations": "covariance_whitening"},
        ids[2]: {
            "metadata": {"model_name": "gpt2-small"},
            "d_in": 5,
            "normalize_activations": "covariance_whitening",
        },  # fmt: skip
        ids[3]: {},  # the model has three layers
    }
    specs = [publish(hub, sae_id, **settings) for sae_id, settings in wrong.items()]
    specs.append(SAESpec(JB, ids[4]))  # nothing is there
    model = hooked_transformer(model_name="pythia-70m")
    with pytest.raises(CertifyError) as raised:
        check_configs(specs, model)
    text = str(raised.value)
    assert text.startswith("4 of 5 SAEs cannot be certified; nothing was measured:")
    lines = text.splitlines()[1:]
    expected = [
        (1, "covariance_whitening"),
        (2, "covariance_whitening"),
        (2, "trained on 'gpt2-small'"),
        (2, "width 5"),
        (3, f"{N_LAYERS} layers"),
        (4, "cannot be read"),
    ]
    assert len(lines) == len(expected)
    for line, (layer, reason) in zip(lines, expected, strict=True):
        assert line.startswith(f"- {JB}/{ids[layer]}: ")
        assert reason in line
    check_configs(specs[:1], model)


def test_things_without_a_configuration() -> None:
    with pytest.raises(CertifyError, match="Linear is neither an SAE nor its configuration"):
        check_config(torch.nn.Linear(2, 2))
    message = r"neither a model.*pass the model or model\.cfg"
    for odd in ("gpt2", torch.nn.Linear(2, 2)):
        for hook in ("blocks.1.hook_resid_post", "blocks.1.hook_mlp_out"):
            with pytest.raises(CertifyError, match=message):
                check_config(make_sae(hook=hook), odd, CertifyConfig())
            with pytest.raises(CertifyError, match=message):
                check_config(make_sae(hook=hook), odd)
    model = SimpleNamespace(d_model=D_MODEL, n_layers=1, n_ctx=None)
    with pytest.raises(CertifyError, match="blocks.1.hook_resid_post.*1 layers"):
        check_config(make_sae(), model)
