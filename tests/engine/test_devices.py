"""Model and SAE on different devices, of different dtypes: the same certificate, nothing moved."""

from __future__ import annotations

import copy
import dataclasses
import functools
from typing import Any

import numpy as np
import pytest
import torch
from sae_lens import SAE
from saes import test_third_party as third_party
from torch import Tensor
from transformer_lens.utilities.multi_gpu import get_device_for_block_index

from engine import second_device
from engine.builders import SEQ_LEN, TRANSCODERS, make_sae, make_tokens, of_class
from engine.second_device import SECOND, THIRD
from saelens_certify import (
    Certificate,
    CertifyConfig,
    CertifyError,
    certify,
    demo,
    measure,
    states,
    verify,
)
from saelens_certify.cli import main
from saelens_certify.evidence import CALIBRATION as CALIBRATION_FILE
from saelens_certify.integrations.transformer_lens import proxy_hooks
from saelens_certify.monitor import Monitor

CPU = "cpu"
PLACES = {
    "model away": (SECOND, CPU),
    "SAE away": (CPU, SECOND),
    "both away": (SECOND, SECOND),
    "two devices": (SECOND, THIRD),
}
FUSED = ("topk", "jumprelu", "gated", "abstopk", "groupmax", "jumprelu_skip_transcoder")
OWN_ENCODERS = ("matching_pursuit", "temporal")
THREE_KINDS = ("topk", "jumprelu_skip_transcoder", "temporal")
CONFIG = CertifyConfig(
    seq_len=SEQ_LEN,
    permutations=1,
    matched_permutations=1,
    random_decoders=1,
    tau=10,
    progress=False,
    seed=4,
)
VARIANTS = ("sae", "pool", "permuted_0", "random_decoder_0")
CALIBRATION, EVALUATION = make_tokens(12, seed=1), make_tokens(16, seed=2)

pytestmark = pytest.mark.usefixtures("_second_device")


@pytest.fixture(scope="module")
def _second_device() -> None:
    second_device.load()


@functools.cache
def model_on(device: str, model_class: str = "HookedTransformer", dtype=torch.float32) -> Any:
    model = copy.deepcopy(of_class(model_class, dtype=dtype))
    return model if device == CPU else model.to(device)


def sae_on(device: str, kind: str = "topk", **options: Any) -> Any:
    hook = "blocks.1.hook_resid_pre" if kind in TRANSCODERS else "blocks.1.hook_resid_post"
    return make_sae(kind, hook, **options).to(device=torch.device(device))


def run(model: Any, sae: Any, **options: Any) -> Certificate:
    data = {"calibration": CALIBRATION, "evaluation": EVALUATION, "config": CONFIG} | options
    return certify(model, sae, **data)


@functools.cache
def at_home(kind: str = "topk", model_class: str = "HookedTransformer") -> Certificate:
    return run(model_on(CPU, model_class), sae_on(CPU, kind))


def snapshot(*modules: torch.nn.Module) -> list[tuple[str, Tensor, torch.device, Tensor]]:
    return [
        (name, tensor, tensor.device, tensor.detach().cpu().clone())
        for module in modules
        for name, tensor in second_device.tensors_of(module)
    ]


def assert_unmoved(before: list[Any], *modules: torch.nn.Module) -> None:
    after = snapshot(*modules)
    assert [item[0] for item in after] == [item[0] for item in before]
    for (name, tensor, device, values), (_, then, device_then, values_then) in zip(
        after, before, strict=True
    ):
        assert tensor is then, name
        assert device == device_then, name
        assert torch.equal(values, values_then), name


def assert_same(found: Certificate, expected: Certificate, atol: float = 1e-5) -> None:
    assert torch.equal(found.calibration.counts, expected.calibration.counts)
    assert found.evidence.column_names == expected.evidence.column_names
    for name in expected.evidence.column_names:
        if name not in ("sequence", "document"):
            ours, theirs = (each.column(name).astype(float) for each in (found, expected))
            np.testing.assert_allclose(ours, theirs, atol=atol, rtol=1e-5, err_msg=name)
    for name, bound in expected.bounds.items():
        assert abs(found.bounds[name].value - bound.value) < atol, name


# ---- Certificates -----------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [*FUSED, *OWN_ENCODERS])
@pytest.mark.parametrize("place", PLACES)
def test_certificate_is_the_same(kind, place) -> None:
    device, sae_device = PLACES[place]
    model, sae = model_on(device), sae_on(sae_device, kind)
    before = snapshot(model, sae)
    found = run(model, sae)
    assert_unmoved(before, model, sae)
    assert {str(tensor.device) for _, tensor in second_device.tensors_of(sae)} == {sae_device}
    assert found.manifest["sae"]["device"] == sae_device
    assert found.column("violation").any(), "the pool must matter"
    assert_same(found, at_home(kind))


@pytest.mark.parametrize("kind", THREE_KINDS)
@pytest.mark.parametrize("place", PLACES)
def test_certificate_of_a_bridge_is_the_same(kind, place) -> None:
    device, sae_device = PLACES[place]
    model, sae = model_on(device, "TransformerBridge"), sae_on(sae_device, kind)
    before = snapshot(model, sae)
    found = run(model, sae)
    assert_unmoved(before, model, sae)
    assert_same(found, at_home(kind, "TransformerBridge"))


@pytest.mark.parametrize("dtypes", ["bfloat16 float32", "float16 float32", "float32 bfloat16",
                                    "bfloat16 bfloat16", "float16 bfloat16"])  # fmt: skip
@pytest.mark.parametrize("place", ["model away", "SAE away"])
@pytest.mark.parametrize("kind", ["topk", "jumprelu_skip_transcoder", "matching_pursuit"])
def test_dtypes_across_devices(kind, place, dtypes) -> None:
    dtype, sae_dtype = dtypes.split()
    device, sae_device = PLACES[place]
    model = model_on(device, dtype=getattr(torch, dtype))
    sae = sae_on(sae_device, kind, dtype=sae_dtype)
    before = snapshot(model, sae)
    found = run(model, sae)
    assert_unmoved(before, model, sae)
    expected = run(model_on(CPU, dtype=getattr(torch, dtype)), sae_on(CPU, kind, dtype=sae_dtype))
    assert_same(found, expected)


def test_own_classes_and_normalised_activations() -> None:
    """What else keeps tensors of its own: a class's own decode, statistics of each token."""
    for make in (
        functools.partial(sae_on, normalize_activations="layer_norm"),
        functools.partial(sae_on, kind="standard", apply_b_dec_to_input=False),
        lambda device: third_party.make(normalize_activations="layer_norm").to(device=device),
    ):
        expected = run(model_on(CPU), make(CPU))
        for device, sae_device in PLACES.values():
            assert_same(run(model_on(device), make(sae_device)), expected)


@pytest.mark.parametrize("place", PLACES)
def test_settings_and_tokens_on_a_device(place) -> None:
    device, sae_device = PLACES[place]
    for settings in (
        {"positions": "no_bos", "coding": "topk:4"},
        {"part_sequences": 5, "batch_tokens": 3 * SEQ_LEN, "logits_mib": 1},
        {"impl": "torch"},
    ):
        config = dataclasses.replace(CONFIG, **settings)
        found = run(
            model_on(device),
            sae_on(sae_device),
            calibration=CALIBRATION.to(device),
            evaluation=EVALUATION.to(sae_device),
            config=config,
        )
        assert_same(found, run(model_on(CPU), sae_on(CPU), config=config))


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("kind", THREE_KINDS)
def test_defaults_of_torch_do_not_matter(place, kind, tmp_path) -> None:
    """People set ``torch.set_default_device("cuda")``: what belongs on the CPU is put there."""
    device, sae_device = PLACES[place]
    pair = model_on(device), sae_on(sae_device, kind)
    expected = at_home(kind)
    torch.set_default_dtype(torch.float64)
    try:
        with torch.device(SECOND):
            found = run(*pair, output=tmp_path / "run")
            verify(tmp_path / "run", model=pair[0], sae=pair[1], evaluation=EVALUATION)
            monitor = Monitor(found, pair[1], share=1.0, on_error="raise")
            with monitor.attached(pair[0]):
                pair[0](EVALUATION.to(device))
            for variant in VARIANTS:
                proxy_hooks(pair[1], variant, found)
            assert demo.load_sequences("evaluation").tokens.device == torch.device(CPU)
    finally:
        torch.set_default_dtype(torch.float32)
    assert_same(found, expected)
    assert monitor.report().totals.sequences == len(EVALUATION)


def test_compiled_operators_are_not_asked_for_where_there_are_none(tmp_path) -> None:
    config = dataclasses.replace(CONFIG, impl="native")
    for device, sae_device in ((CPU, SECOND), (SECOND, CPU)):
        folder = tmp_path / device.replace(":", "")
        with pytest.raises(CertifyError, match="no compiled operators for privateuseone"):
            run(model_on(device), sae_on(sae_device), config=config, output=folder)
        assert not (folder / CALIBRATION_FILE).exists(), "known before any long work"


@pytest.mark.parametrize("kind", THREE_KINDS)
@pytest.mark.parametrize("place", ["model away", "SAE away"])
def test_autocast(kind, place) -> None:
    """Refused by `certify`; a monitor computes its own numbers without it, wherever its SAE is."""
    device, sae_device = PLACES[place]
    model, sae = model_on(device), sae_on(sae_device, kind)
    reports = []
    for enabled in (False, True):
        monitor = Monitor(at_home(kind), sae, share=1.0, on_error="raise")
        # Of the SAE's device: the model on the other one is not changed by it.
        autocast = torch.autocast(torch.device(sae_device).type, torch.bfloat16, enabled=enabled)
        with autocast, monitor.attached(model):
            model(EVALUATION)
        reports.append(monitor.report().to_dict())
    assert reports[1] == pytest.approx(reports[0], abs=1e-6)
    autocast = torch.autocast(torch.device(device).type, torch.bfloat16)
    with autocast, pytest.raises(CertifyError, match="autocast is on"):
        run(model, sae)


@pytest.mark.parametrize("sae_device", [CPU, SECOND, THIRD])
@pytest.mark.parametrize("hook", ["blocks.0.hook_resid_pre", "blocks.1.attn.hook_z",
                                  "blocks.2.hook_mlp_out", "blocks.2.hook_resid_post"])  # fmt: skip
def test_a_model_split_over_devices(hook, sae_device) -> None:
    """TransformerLens moves the residual on to the device of each block; the head is on the last."""
    model = split_model()
    sae = make_sae("topk", hook, **({"reshape_activations": "hook_z"} if "hook_z" in hook else {}))
    expected = run(model_on(CPU), sae)
    sae.to(device=torch.device(sae_device))
    before = snapshot(model, sae)
    assert_same(run(model, sae), expected)
    assert_unmoved(before, model, sae)


@functools.cache
def split_model() -> Any:
    model = copy.deepcopy(of_class("HookedTransformer"))
    model.cfg.device, model.cfg.n_devices = SECOND, 2
    parts = [(part, SECOND) for part in (model.embed, model.pos_embed)]
    parts += [(part, THIRD) for part in (model.ln_final, model.unembed)]
    parts += [
        (block, get_device_for_block_index(index, model.cfg))
        for index, block in enumerate(model.blocks)
    ]
    for part, device in parts:
        part.to(device)
    assert {str(parameter.device) for parameter in model.parameters()} == {SECOND, THIRD}
    return model


# ---- Hooks, monitors, verification, command line ----------------------------------------------


@pytest.mark.parametrize("kind", THREE_KINDS)
@pytest.mark.parametrize("place", PLACES)
def test_proxy_hooks(kind, place) -> None:
    device, sae_device = PLACES[place]
    certificate = at_home(kind)
    home, home_sae = model_on(CPU), sae_on(CPU, kind)
    model, sae = model_on(device), sae_on(sae_device, kind)
    before = snapshot(model, sae)
    coded = torch.ones(EVALUATION.shape, dtype=torch.bool)
    coded[:, :3] = False
    for variant in VARIANTS:
        for positions in (None, coded):
            logits = [
                each.run_with_hooks(
                    EVALUATION, fwd_hooks=proxy_hooks(its, variant, certificate, coded=positions)
                )
                for each, its in ((model, sae), (home, home_sae))
            ]
            assert str(logits[0].device) == device
            torch.testing.assert_close(logits[0].to(CPU), logits[1], atol=1e-5, rtol=1e-5)
    assert_unmoved(before, model, sae)


@pytest.mark.parametrize("kind", THREE_KINDS)
@pytest.mark.parametrize("place", PLACES)
def test_monitor(kind, place) -> None:
    device, sae_device = PLACES[place]

    def watched(model: Any, sae: Any) -> dict[str, float]:
        monitor = Monitor(at_home(kind), sae, share=1.0, on_error="raise")
        with monitor.attached(model):
            for start in range(0, len(EVALUATION), 6):
                model(EVALUATION[start : start + 6])
        return monitor.report().to_dict()

    model, sae = model_on(device), sae_on(sae_device, kind)
    before = snapshot(model, sae)
    found = watched(model, sae)
    assert_unmoved(before, model, sae)
    assert found["sequences"] == len(EVALUATION)
    assert found == pytest.approx(watched(model_on(CPU), sae_on(CPU, kind)), abs=1e-6)


@pytest.mark.parametrize("place", PLACES)
def test_verify(place, tmp_path) -> None:
    """Certified in one place, measured again in every other."""
    device, sae_device = PLACES[place]
    config = dataclasses.replace(CONFIG, part_sequences=6)
    model, sae = model_on(device), sae_on(sae_device)
    run(model, sae, output=tmp_path / "run", config=config)
    for other, other_sae in PLACES.values():
        pair = {"model": model_on(other), "sae": sae_on(other_sae)}
        before = snapshot(*pair.values())
        result = verify(tmp_path / "run", evaluation=EVALUATION, **pair)
        assert_unmoved(before, *pair.values())
        assert result.n_remeasured == len(EVALUATION)
        assert result.largest_difference < 1e-5


def test_command_line(tmp_path, monkeypatch) -> None:
    """``--device`` is for both; its certificate is that of a CPU."""
    load = SAE.load_from_disk.__func__

    def load_and_move(cls: Any, path: Any, device: str, **options: Any) -> Any:
        # safetensors knows the names of real devices only.
        return load(cls, path, device=CPU, **options).to(device=torch.device(device))

    monkeypatch.setattr(SAE, "load_from_disk", classmethod(load_and_move))
    np.save(tmp_path / "tokens.npy", make_tokens(60, seed=9).numpy())
    make_sae(d_in=128).save_model(tmp_path / "sae")
    found = []
    for device in (CPU, SECOND):
        folder = tmp_path / device.replace(":", "")
        arguments = ["run", "--model", "demo", "--sae", str(tmp_path / "sae")]
        arguments += ["--data", str(tmp_path / "tokens.npy"), "--output", str(folder)]
        main([*arguments, "--seq_len", "12", "--no-progress", "--device", device])
        found.append(Certificate.load(folder))
    assert [each.manifest["sae"]["device"] for each in found] == [CPU, SECOND]
    assert_same(found[1], found[0])


# ---- What these tests are worth ---------------------------------------------------------------


@pytest.mark.parametrize("place", ["model away", "SAE away", "two devices"])
def test_a_tensor_that_was_not_moved_is_noticed(place, monkeypatch) -> None:
    def stay(activation: Tensor, width: int, device: torch.device) -> Tensor:  # noqa: ARG001
        return activation.reshape(*activation.shape[:2], width).float()

    for module in (measure, states):
        monkeypatch.setattr(module, "by_width", stay)
    device, sae_device = PLACES[place]
    with pytest.raises((RuntimeError, CertifyError), match="device|is on"):
        run(model_on(device), sae_on(sae_device))


def test_every_operator_of_these_tests_exists_for_cuda() -> None:
    """An operator for CPUs alone would work here and fail on a GPU."""
    run(model_on(SECOND), sae_on(SECOND, "gated"))
    only_cpu = "aten::_scaled_dot_product_flash_attention_for_cpu"
    assert only_cpu not in second_device.operators_of_cuda()
    assert {"aten::mm.out", "aten::gather.out"} <= second_device.operators()
    assert second_device.operators() <= second_device.operators_of_cuda()
