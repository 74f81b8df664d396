"""Models whose weights were processed otherwise than for the SAE's training are refused."""

from __future__ import annotations

import copy
import functools
import warnings
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from engine.builders import SEQ_LEN, hooked_transformer, make_sae, make_tokens, of_class
from sae_lens.saes.sae import SAEMetadata

from saelens_certify import CertifyConfig, CertifyError, certify, check_config
from saelens_certify.cli import EXIT_INPUT, main
from saelens_certify.models import load_model
from saelens_certify.saes.configurations import read_source
from saelens_certify.saes.processing import (
    PROCESSING,
    centred,
    check_processing,
    common_arguments,
    folded,
)
from saelens_certify.saes.sources import SAESpec
from saes.hub_cache import HubCache, hub, located

__all__ = ["hub"]

KEYS = ("fold_ln", "center_writing_weights")
TOKENS = make_tokens(2, seed=1)


@functools.cache
def loaded(model_class: str, family: str, *on: str) -> Any:
    """A model whose norms have weights of their own, processed in the ways named."""
    # Made anew: the MLPs of a copied HookedSAETransformer would run those of the original.
    model = of_class.__wrapped__(model_class, family)
    generator = torch.Generator().manual_seed(0)
    bridge = "Bridge" in model_class
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for norm in [n for b in model.blocks for n in (b.ln1, b.ln2)] + [model.ln_final]:
            weight = norm.weight if bridge else norm.w
            weight.add_(0.3 * torch.randn(weight.shape, generator=generator))
        asked = {key: key in on for key in PROCESSING}
        if bridge and on:
            model.enable_compatibility_mode(**asked)
        elif on:
            model.load_and_process_state_dict(model.state_dict(), **asked)
    return model


def activation(model: Any, hook: str) -> torch.Tensor:
    seen: list[torch.Tensor] = []
    with torch.no_grad():
        model.run_with_hooks(TOKENS, fwd_hooks=[(hook, lambda x, **_: seen.append(x.clone()))])
    return seen[0]


def configuration(hook: str, hook_out: str | None = None, **metadata: Any) -> Any:
    kind = "topk" if hook_out is None else "transcoder"
    config = copy.deepcopy(make_sae(kind, hook, hook_out).cfg)
    for name, value in metadata.items():
        config.metadata[name] = value
    return config


@pytest.mark.parametrize("family", ["gpt2", "llama"])
@pytest.mark.parametrize("model_class", ["HookedSAETransformer", "TransformerBridge"])
def test_refused_is_what_changes_the_activation(model_class: str, family: str) -> None:
    """Whatever was asked for and done, at every kind of hook; nothing else is refused."""
    states: list[tuple[str, ...]] = [(), *((key,) for key in KEYS), KEYS]
    hooks = [
        "hook_embed", "blocks.1.hook_resid_pre", "blocks.1.hook_resid_post", "blocks.1.hook_attn_out",
        "blocks.1.hook_mlp_out", "blocks.1.attn.hook_z", "blocks.1.mlp.hook_post",
        "blocks.1.mlp.hook_in",
    ]  # fmt: skip
    if model_class == "TransformerBridge":
        hooks += ["blocks.1.attn.hook_in", "blocks.1.ln2.hook_out", "blocks.1.hook_out"]
    refused = 0
    for hook in hooks:
        values = {on: activation(loaded(model_class, family, *on), hook) for on in states}
        for wanted in states:
            asked = {key: key in wanted for key in KEYS}
            config = configuration(hook, model_from_pretrained_kwargs=asked)
            for on in states:
                model = loaded(model_class, family, *on)
                if torch.allclose(values[on], values[wanted], atol=1e-3):
                    check_processing(model, config)
                    continue
                with pytest.raises(CertifyError, match="model_from_pretrained_kwargs = "):
                    check_processing(model, config)
                refused += 1
    assert refused >= 8


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_the_remedy_is_the_same_in_both_model_classes(family: str) -> None:
    """What the messages name gives the activations of `from_pretrained_no_processing(..., **kwargs)`."""
    for key in KEYS:
        for hook in ("blocks.1.hook_resid_post", "blocks.1.mlp.hook_in"):
            one, other = (
                activation(loaded(model_class, family, key), hook)
                for model_class in ("HookedSAETransformer", "TransformerBridge")
            )
            torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-4)


def test_remedies_name_the_call() -> None:
    asked = {"center_writing_weights": True}
    config = configuration("blocks.1.hook_resid_pre", model_from_pretrained_kwargs=asked)
    call = r"no_processing\(name, center_writing_weights=True\)"
    with pytest.raises(CertifyError, match=f"is not centred.*{call}"):
        check_processing(loaded("HookedTransformer", "gpt2"), config)
    call = (
        r"load it anew and call model.enable_compatibility_mode\(fold_ln=False, center_writing_wei"
    )
    with pytest.raises(CertifyError, match=call):
        check_processing(loaded("TransformerBridge", "gpt2"), config)
    config.metadata.model_from_pretrained_kwargs = {"center_writing_weights": False}
    with pytest.raises(CertifyError, match=r"do not call enable_compatibility_mode\(\)"):
        check_processing(loaded("TransformerBridge", "gpt2", *KEYS), config)


@pytest.mark.parametrize("model_class", ["HookedSAETransformer", "TransformerBridge"])
def test_transcoders_of_hugging_face_activations(model_class: str) -> None:
    """Gemma Scope 2 names the norm's output by its Hugging Face path only."""
    config = configuration(
        "blocks.1.hook_mlp_in",
        "blocks.1.hook_mlp_out",
        hf_hook_name="model.layers.1.pre_feedforward_layernorm.output",
    )
    check_processing(loaded(model_class, "llama"), config)
    with pytest.raises(CertifyError, match="folded into the next layer, but.*pre_feedforward"):
        check_processing(loaded(model_class, "llama", "fold_ln"), config)


def test_where_nothing_is_known_it_is_said() -> None:
    config = configuration("blocks.1.hook_resid_pre")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check_processing(loaded("HookedTransformer", "gpt2"), config)
        check_processing(loaded("HookedTransformer", "gpt2", "fold_ln"), config)
    with pytest.warns(UserWarning, match="is centred, but SAELens trains on weights as they are"):
        check_processing(loaded("HookedTransformer", "gpt2", *KEYS), config)


def test_models_that_do_not_tell_are_let_through() -> None:
    config = configuration(
        "blocks.0.hook_resid_post", model_from_pretrained_kwargs={"center_writing_weights": True}
    )
    model = hooked_transformer(attn_only=True)
    assert centred(model) is None
    check_processing(model, config)
    assert folded(SimpleNamespace(blocks=[])) is None
    assert centred(SimpleNamespace(blocks=[])) is None


@pytest.mark.parametrize("model_class", ["HookedTransformer", "TransformerBridge"])
def test_every_entry_refuses(model_class: str) -> None:
    """The SAE of gpt2-small-res-jb on a model loaded without what its metadata asks for."""
    sae = make_sae(hook="blocks.1.hook_resid_pre")
    sae.cfg.metadata.model_from_pretrained_kwargs = {"center_writing_weights": True}
    model = loaded(model_class, "gpt2")
    with pytest.raises(CertifyError, match="not centred"):
        certify(model, sae, calibration=make_tokens(20, 1), evaluation=make_tokens(20, 2))
    with pytest.raises(CertifyError, match="not centred"):
        check_config(sae, model)
    check_config(sae, model.cfg)  # a configuration does not tell


def test_processed_models_of_both_classes_give_the_same_certificate() -> None:
    sae = make_sae(hook="blocks.1.hook_resid_pre")
    sae.cfg.metadata.model_from_pretrained_kwargs = {"center_writing_weights": True}
    bounds = [
        certify(
            loaded(model_class, "gpt2", "center_writing_weights"),
            sae,
            calibration=make_tokens(40, 1),
            evaluation=make_tokens(40, 2),
            config=CertifyConfig(seq_len=SEQ_LEN, progress=False),
        ).bounds["u_sae"].value
        for model_class in ("HookedTransformer", "TransformerBridge")
    ]  # fmt: skip
    assert abs(bounds[0] - bounds[1]) < 1e-3


def with_arguments(**arguments: Any) -> Any:
    return SimpleNamespace(metadata=SAEMetadata(model_from_pretrained_kwargs=arguments or None))


def test_saes_of_one_run_want_one_model() -> None:
    plain = [with_arguments(), with_arguments(center_writing_weights=False, n_devices=2)]
    assert common_arguments({str(i): config for i, config in enumerate(plain)}) == {}
    assert common_arguments({}) == {}
    jb = with_arguments(center_writing_weights=True)
    assert common_arguments({"a": jb, "b": jb}) == {"center_writing_weights": True}
    with pytest.raises(
        CertifyError, match="several runs:\n- a: {}\n- b: {'center_writing_weights'"
    ):
        common_arguments({"a": plain[0], "b": jb})


@pytest.mark.parametrize("model_class", ["HookedTransformer", "TransformerBridge"])
def test_models_load_as_the_metadata_says(model_class: Any, monkeypatch) -> None:
    model = load_model("demo", model_class=model_class, arguments={"fold_ln": True})
    assert folded(model)
    assert not folded(load_model("demo", model_class=model_class))
    asked: dict[str, Any] = {}
    fresh = of_class.__wrapped__(model_class)

    def fetch(name: str, **options: Any) -> Any:
        asked.update(options, name=name)
        return fresh

    method = "from_pretrained_no_processing"
    monkeypatch.setattr(f"transformer_lens.HookedTransformer.{method}", fetch)
    boot = functools.wraps(of_class("TransformerBridge").boot_transformers)(fetch)
    monkeypatch.setattr("transformer_lens.model_bridge.TransformerBridge.boot_transformers", boot)
    arguments = {"center_writing_weights": True, "checkpoint_index": 7}
    assert centred(load_model("some/model", model_class=model_class, arguments=arguments))
    assert asked["checkpoint_index"] == 7
    if model_class == "TransformerBridge":
        with pytest.raises(CertifyError, match=r"loaded with \['move_to_device'\].*HookedTransfor"):
            load_model("some/model", arguments={"move_to_device": False})


def test_the_command_line_loads_the_model_as_the_metadata_says(
    tmp_path, monkeypatch, capsys
) -> None:
    asked: list[Any] = []

    def stop(*_: Any, arguments: Any, **__: Any) -> None:
        asked.append(arguments)
        raise CertifyError("far enough")

    monkeypatch.setattr("saelens_certify.cli_run.load_model", stop)
    (tmp_path / "documents.txt").write_text("some words")
    for name, arguments in (("a", {"center_writing_weights": True}), ("b", {})):
        sae = make_sae()
        sae.cfg.metadata.model_from_pretrained_kwargs = arguments
        sae.save_model(tmp_path / "saes" / name)
    options = ["--model", "demo", "--data", str(tmp_path / "documents.txt"), "--output", "run"]
    for name in ("saes/a", "saes/b", "saes"):
        assert main(["run", "--sae", str(tmp_path / name), *options]) == EXIT_INPUT
    assert asked == [{"center_writing_weights": True}, {}]
    assert "several runs" in capsys.readouterr().err


def test_the_registry_says_how_the_model_was_loaded(hub: HubCache) -> None:
    """gpt2-small-res-jb: an old configuration, to which SAELens's registry adds the processing."""
    spec = SAESpec("gpt2-small-res-jb", "blocks.1.hook_resid_pre")
    repository, folder = located(spec.release, spec.sae_id)
    published = {"model_name": "gpt2-small", "hook_point": spec.sae_id, "d_in": 32, "d_sae": 96}
    hub.add(repository, f"{folder}/cfg.json", {**published, "dtype": "torch.float32"})
    asked = common_arguments({str(spec): read_source(spec)[0]})
    assert asked == {"center_writing_weights": True}
    for model_class in ("HookedTransformer", "TransformerBridge"):
        with pytest.raises(CertifyError, match="is not centred, but.*center_writing_weights"):
            check_config(spec, loaded(model_class, "gpt2"))
