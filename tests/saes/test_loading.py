"""SAEs from folders and from SAELens's registry: names, dtypes, what is folded, what is refused."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from engine.builders import D_MODEL, make_sae
from hypothesis import given
from hypothesis import strategies as st
from sae_lens import SAE
from safetensors.torch import load_file, save, save_file

from saelens_certify import CertifyError
from saelens_certify.saes import adapt
from saelens_certify.saes.checkpoint import DTYPES, file_dtype, holds, widest
from saelens_certify.saes.loading import LoadedSAE, load_sae, open_sae
from saelens_certify.saes.sources import SAESpec, matching, parse_spec, sae_folders
from saes.hub_cache import HubCache, hub, located
from saes.sparsify_files import checkpoint, write

__all__ = ["hub"]

JB, JB_ID = "gpt2-small-res-jb", "blocks.6.hook_resid_pre"
SCOPE = "llama_scope_lxr_8x"


def save_as(folder: Path, sae: Any, stored: str, declared: str) -> Path:
    """Save an SAE in one dtype under a configuration that names another."""
    sae.save_model(folder)
    weights = load_file(folder / "sae_weights.safetensors")
    save_file(
        {name: tensor.to(DTYPES[stored]) for name, tensor in weights.items()},
        folder / "sae_weights.safetensors",
    )
    config = json.loads((folder / "cfg.json").read_text()) | {"dtype": declared}
    (folder / "cfg.json").write_text(json.dumps(config))
    return folder


def test_a_live_object_is_taken_as_it_is() -> None:
    sae = make_sae()
    assert open_sae(sae, dtype="float64") == LoadedSAE(sae)
    assert load_sae(sae) == (sae, None)


@pytest.mark.parametrize(
    ("stored", "declared", "used", "warns"),
    [
        ("float32", "float32", "float32", None),
        ("float16", "float32", "float32", None),  # as declared, and no weight changes
        ("bfloat16", "bfloat16", "bfloat16", None),
        ("float32", "bfloat16", "float32", "SAELens by itself would cast it to bfloat16"),
        ("float16", "bfloat16", "float16", "cast it to bfloat16"),
    ],
)
def test_dtype_of_a_folder(tmp_path, stored, declared, used, warns) -> None:
    folder = save_as(tmp_path / "sae", make_sae("jumprelu"), stored, declared)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        loaded = open_sae(folder)
    assert loaded.dtype == used
    assert loaded.sae.W_enc.dtype == DTYPES[used]
    assert loaded.origin() == {"release": None, "sae_id": "sae", "checkpoint_dtype": stored}
    assert loaded.name == str(folder)
    messages = [str(w.message) for w in caught if "SAE '" in str(w.message)]
    assert bool(messages) == bool(warns)
    assert warns is None or warns in messages[0]


def test_an_asked_for_dtype_is_reported(tmp_path) -> None:
    folder = save_as(tmp_path / "sae", make_sae(), "float32", "float32")
    with pytest.warns(UserWarning, match="loading it in bfloat16 rounded its weights"):
        assert open_sae(folder, dtype="torch.bfloat16").dtype == "bfloat16"
    folder = save_as(tmp_path / "half", make_sae(), "bfloat16", "bfloat16")
    with pytest.warns(UserWarning, match="changes no weight but the arithmetic"):
        assert open_sae(folder, dtype="float32").dtype == "float32"
    with pytest.raises(CertifyError, match="unknown dtype of an SAE 'int8'.*float32"):
        open_sae(folder, dtype="int8")


@given(kinds=st.lists(st.sampled_from(sorted(DTYPES)), min_size=1, max_size=4))
def test_the_widest_dtype_holds_every_value(kinds) -> None:
    wide = widest(DTYPES[kind] for kind in kinds)
    for kind in kinds:
        assert holds(wide, kind)
        limits = torch.finfo(DTYPES[kind])
        values = torch.tensor([limits.max, limits.tiny, 1 + limits.eps], dtype=DTYPES[kind])
        assert torch.equal(values.to(DTYPES[wide]).to(DTYPES[kind]), values)
    assert wide in kinds or set(kinds) == {"float16", "bfloat16"}


def test_dtypes_of_files(tmp_path) -> None:
    integers = {"n": torch.arange(3), "mask": torch.ones(2, dtype=torch.bool)}
    half = {"w": torch.ones(2, dtype=torch.float16)}
    for tensors, found in (
        (half | integers, "float16"),
        (half | {"b": torch.ones(1, dtype=torch.bfloat16)}, "float32"),
        (half | {"b": torch.ones(1).to(torch.float8_e4m3fn)}, None),
        (integers, None),
    ):
        save_file(tensors, tmp_path / "x.safetensors")
        assert file_dtype(tmp_path / "x.safetensors") == found
    for kind in ("float16", "float32", "float64"):
        np.savez(tmp_path / "x.npz", w_enc=np.ones((3, 4), kind), b=np.ones(2, np.float16))
        assert file_dtype(tmp_path / "x.npz") == kind


def test_a_folder_of_several_saes_is_listed(tmp_path) -> None:
    for name in ("layer_1", "deep/layer_2"):
        make_sae().save_model(tmp_path / name)
    assert sae_folders(tmp_path) == [tmp_path / "deep/layer_2", tmp_path / "layer_1"]
    assert sae_folders(tmp_path / "layer_1") == [tmp_path / "layer_1"]
    with pytest.raises(
        CertifyError, match="no cfg.json; it holds SAE folders deep/layer_2, layer_1"
    ):
        open_sae(tmp_path)
    (tmp_path / "empty").mkdir()
    with pytest.raises(CertifyError, match="no cfg.json$"):
        open_sae(tmp_path / "empty")


def test_sparsify_folders(tmp_path) -> None:
    folder = write(checkpoint(), tmp_path / "layers.1")
    loaded = open_sae(folder)
    assert loaded.sae.cfg.metadata.hook_name == "blocks.1.hook_resid_post"
    assert loaded.checkpoint_dtype == "float32"
    with pytest.warns(UserWarning, match="rounded its weights"):
        assert open_sae(folder, dtype="bfloat16").dtype == "bfloat16"


def test_saved_classes_of_this_package_load_again(tmp_path) -> None:
    sparse = open_sae(write(checkpoint(activation="groupmax"), tmp_path / "layers.1"))
    sparse.sae.save_model(tmp_path / "saved")
    again = open_sae(tmp_path / "saved").sae
    assert type(again) is type(sparse.sae)
    x = torch.randn(5, again.cfg.d_in)
    torch.testing.assert_close(again.forward(x), sparse.sae.forward(x))


@pytest.mark.parametrize("damage", ["weights", "config", "cut", "shape"])
def test_damaged_folders_are_named(tmp_path, damage) -> None:
    make_sae().save_model(tmp_path)
    weights = tmp_path / "sae_weights.safetensors"
    if damage == "weights":
        weights.unlink()
    elif damage == "config":
        (tmp_path / "cfg.json").write_text("{")
    elif damage == "cut":
        weights.write_bytes(weights.read_bytes()[:-9])
    else:
        make_sae(d_in=D_MODEL + 1).save_model(tmp_path / "other")
        weights.write_bytes((tmp_path / "other" / weights.name).read_bytes())
    with pytest.raises(CertifyError, match="cannot be read") as raised:
        open_sae(tmp_path)
    assert str(tmp_path) in str(raised.value)


def test_names() -> None:
    known = SAESpec(JB, JB_ID)
    assert parse_spec(f"{JB}/{JB_ID}") == known
    assert str(known) == f"{JB}/{JB_ID}"
    assert parse_spec("gemma-scope-2b-pt-res/layer_20/width_16k/average_l0_71") == SAESpec(
        "gemma-scope-2b-pt-res", "layer_20/width_16k/average_l0_71"
    )
    assert parse_spec("someone/some-saes/deep/layer_3") == SAESpec(
        "someone/some-saes", "deep/layer_3"
    )
    assert not SAESpec("someone/some-saes", "deep/layer_3").registered
    for text, match in (
        ("nonsense", "neither an existing folder"),
        ("./nowhere", "neither an existing folder"),
        ("gpt2-small-res-jbx/x", "no release 'gpt2-small-res-jbx'.*gpt2-small-res-jb"),
        (f"{JB}/blocks.66.hook_resid_pre", "has no SAE 'blocks.66.*it has 13, e.g. blocks"),
    ):
        with pytest.raises(CertifyError, match=match):
            parse_spec(text)


def test_a_repository_that_is_registered_is_loaded_as_registered() -> None:
    """SAELens would warn, and leave out conversion, overrides and the scale of normalisation."""
    repository, folder = located(SCOPE, "l3r_8x")
    assert parse_spec(f"{repository}/{folder}") == SAESpec(SCOPE, "l3r_8x")


def test_patterns_match_whole_names_as_in_sae_lens_evals() -> None:
    from sae_lens.evals import get_saes_from_regex

    for release, sae_id in (
        ("gpt2-small-res-jb", r"blocks\.[0-5]\..*"),
        (".*_scope_lx.*", "l1[0-3]._8x"),
        (f"{JB}.*", "blocks.6.*"),
    ):
        expected = [SAESpec(*entry[:2]) for entry in get_saes_from_regex(release, sae_id)]
        assert matching(release, sae_id) == expected
        assert expected


@pytest.mark.parametrize(
    ("release", "sae_id", "message"),
    [
        (
            "gpt2-small-res",
            ".*",
            r"no release .* 'gpt2-small-res' as a whole, but in part gpt2-small-",
        ),
        ("gpt2-smal-res-jb", ".*", "near names: gpt2-small-res-jb"),
        (JB, "blocks.77.*", "none of the 13 SAEs of gpt2-small-res-jb matches"),
        (JB, "blocks.6", "but in part blocks.6.hook_resid_pre; allow for the rest"),
        ("(", ".*", r"'\(' is no regular expression"),
    ],
)
def test_patterns_that_match_nothing(release, sae_id, message) -> None:
    with pytest.raises(CertifyError, match=message):
        matching(release, sae_id)


@pytest.mark.parametrize("stored", ["float32", "bfloat16"])
def test_registered_sae_keeps_the_dtype_of_its_file(hub: HubCache, stored) -> None:
    sae = make_sae("standard").to(DTYPES[stored])
    hub.add_sae(JB, JB_ID, sae)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        loaded = open_sae(f"{JB}/{JB_ID}")
    assert (loaded.release, loaded.sae_id, loaded.name) == (JB, JB_ID, f"{JB}/{JB_ID}")
    assert loaded.checkpoint_dtype == loaded.dtype == stored
    torch.testing.assert_close(loaded.sae.W_enc, sae.W_enc, atol=0, rtol=0)
    told = [w for w in caught if "SAELens by itself would cast it to float32" in str(w.message)]
    assert bool(told) == (stored == "bfloat16")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert SAE.from_pretrained(JB, JB_ID).W_enc.dtype == torch.float32  # what is warned about


def test_repository_of_ones_own(hub: HubCache) -> None:
    hub.add_sae("someone/some-saes", "layer_1", make_sae())
    loaded = open_sae("someone/some-saes/layer_1")
    assert (loaded.release, loaded.sae_id) == ("someone/some-saes", "layer_1")
    with pytest.raises(
        CertifyError, match="was taken for a Hugging Face repository.*near.*-res-jb"
    ):
        open_sae(f"{JB}x/blocks.6/hook_resid_pre")


def test_sparsify_checkpoint_of_a_repository(hub: HubCache, tmp_path) -> None:
    folder = write(checkpoint(), tmp_path / "layers.2")
    for name in ("cfg.json", "sae.safetensors"):
        hub.add("someone/sparse", f"layers.2/{name}", (folder / name).read_bytes())
    loaded = open_sae("someone/sparse/layers.2")
    assert loaded.sae.cfg.metadata.hook_name == "blocks.2.hook_resid_post"
    assert loaded.release == "someone/sparse"
    x = torch.randn(3, loaded.sae.cfg.d_in)
    torch.testing.assert_close(loaded.sae.forward(x), open_sae(folder).sae.forward(x))


def add_llama_scope(hub: HubCache, sae_id: str) -> dict[str, torch.Tensor]:
    """Put a tiny SAE in Llama Scope's format, stored in bfloat16."""
    repository, folder = located(SCOPE, sae_id)
    d_in, d_sae = 8, 24
    generator = torch.Generator().manual_seed(0)
    shapes = {
        "encoder.weight": (d_sae, d_in), "decoder.weight": (d_in, d_sae),
        "encoder.bias": (d_sae,), "decoder.bias": (d_in,),
    }  # fmt: skip
    weights = {
        name: torch.randn(shape, generator=generator).bfloat16() for name, shape in shapes.items()
    }
    hub.add(
        repository,
        f"{folder}/hyperparams.json",
        {
            "d_model": d_in, "d_sae": d_sae, "jump_relu_threshold": 0.3,
            "hook_point_in": "blocks.3.hook_resid_post",
            "dataset_average_activation_norm": {"in": 3.0},
        },
    )  # fmt: skip
    hub.add(repository, f"{folder}/checkpoints/final.safetensors", save(weights))
    return weights


def test_a_folded_scale_is_not_rounded_to_16_bits(hub: HubCache) -> None:
    weights = add_llama_scope(hub, "l3r_8x")
    with pytest.warns(UserWarning, match="stored in bfloat16 and was loaded in float32"):
        loaded = open_sae(f"{SCOPE}/l3r_8x")
    factor = SAESpec(SCOPE, "l3r_8x").norm_scaling_factor
    assert factor is not None
    assert loaded.checkpoint_dtype == "bfloat16"
    expected = weights["encoder.weight"].T.float() * factor
    torch.testing.assert_close(loaded.sae.W_enc.data, expected, atol=0, rtol=0)
    assert adapt(loaded.sae).input_hook == "blocks.3.hook_resid_post"


def test_an_unfolded_scale_is_refused_before_weights(hub: HubCache, monkeypatch) -> None:
    spec = SAESpec(SCOPE, "l3r_8x")
    add_llama_scope(hub, spec.sae_id)
    from saelens_certify.saes.sources import registry

    monkeypatch.delitem(registry()[SCOPE].norm_scaling_factor, spec.sae_id)
    monkeypatch.setattr(SAE, "from_pretrained", None)
    with pytest.raises(CertifyError, match="expected_average_only_in.*wrong scale"):
        open_sae(spec)


def test_pickled_checkpoints_tell_their_dtype_while_they_load(hub: HubCache) -> None:
    release = next(
        name
        for name, entry in _registry().items()
        if entry.conversion_func == "dictionary_learning_1"
    )
    sae_id = next(iter(_registry()[release].saes_map))
    repository, folder = located(release, sae_id)
    d_in, d_sae = 6, 10
    trainer = {
        "layer": 1, "dict_class": "AutoEncoder", "activation_dim": d_in, "dict_size": d_sae,
        "lm_name": "someone/pythia-70m",
    }  # fmt: skip
    hub.add(repository, f"{folder}/config.json", {"trainer": trainer, "buffer": {"ctx_len": 64}})
    weights = {
        "encoder.weight": torch.randn(d_sae, d_in).bfloat16(),
        "decoder.weight": torch.randn(d_in, d_sae).bfloat16(),
        "encoder.bias": torch.randn(d_sae).bfloat16(),
        "bias": torch.randn(d_in).bfloat16(),
    }
    hub.add_pickled(repository, f"{folder}/ae.pt", weights)
    with pytest.warns(UserWarning, match="SAELens by itself would cast"):
        loaded = open_sae(SAESpec(release, sae_id))
    assert loaded.checkpoint_dtype == loaded.dtype == "bfloat16"
    torch.testing.assert_close(loaded.sae.W_enc.data, weights["encoder.weight"].T, atol=0, rtol=0)
    with pytest.warns(UserWarning, match="changes no weight"):
        assert open_sae(SAESpec(release, sae_id), dtype="float32").dtype == "float32"


def _registry() -> dict[str, Any]:
    from saelens_certify.saes.sources import registry

    return registry()
