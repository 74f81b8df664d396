"""SAE classes that this package has never heard of, through their own encode and decode."""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import sae_lens.registry
import torch
from engine.builders import D_MODEL, D_SAE, SEQ_LEN, hooked_transformer, make_tokens
from sae_lens import register_sae_class
from sae_lens.saes.sae import SAE, SAEConfig, SAEMetadata
from torch import Tensor

from saelens_certify import CertifyConfig, CertifyError, certify
from saelens_certify.integrations.transformer_lens import proxy_hooks
from saelens_certify.pool import Pool
from saelens_certify.proxies import random_decoder
from saelens_certify.saes import Coding, adapt
from saelens_certify.saes.coding import NATIVE
from saelens_certify.saes.loading import load_sae
from saelens_certify.saes.selfcheck import self_check

CONFIG = CertifyConfig(seq_len=SEQ_LEN, permutations=1, progress=False)


@dataclass
class SquareConfig(SAEConfig):
    """Configuration of `SquareSAE`."""

    @classmethod
    def architecture(cls) -> str:
        return "square"


class SquareSAE(SAE[SquareConfig]):
    """Signed features and a decoder that is not linear in them."""

    def encode(self, x: Tensor) -> Tensor:
        scores = self.process_sae_in(x) @ self.W_enc
        return self.hook_sae_acts_post(scores * (scores.abs() > 0.7))

    def decode(self, feature_acts: Tensor) -> Tensor:
        bent = feature_acts * (1 + 0.1 * feature_acts.abs())
        out = self.run_time_activation_norm_fn_out(bent @ self.W_dec + self.b_dec)
        return self.reshape_fn_out(out, self.d_head)


class BatchRanked(SquareSAE):
    """Ranks over the whole batch, as training-form BatchTopK does."""

    def encode(self, x: Tensor) -> Tensor:
        scores = (self.process_sae_in(x) @ self.W_enc).relu()
        kept = scores.flatten().topk(4 * scores[..., 0].numel()).values.min()
        return scores * (scores >= kept)


class AddsMore(SquareSAE):
    """A forward that is more than decode(encode(x))."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + 0.1 * x


@pytest.fixture(autouse=True)
def registered() -> Iterator[None]:
    register_sae_class("square", SquareSAE, SquareConfig)
    yield
    del sae_lens.registry.SAE_CLASS_REGISTRY["square"]


def make(sae_class: type[SquareSAE] = SquareSAE, hook="blocks.1.hook_resid_post", **more) -> Any:
    settings: dict[str, Any] = {"d_in": D_MODEL, "d_sae": D_SAE, **more}
    settings["metadata"] = SAEMetadata(hook_name=hook, model_name=None)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        sae = sae_class(SquareConfig(**settings))
        with torch.no_grad():
            sae.W_dec.data = torch.nn.functional.normalize(torch.randn_like(sae.W_dec), dim=-1)
            sae.W_enc.data = sae.W_dec.data.T.contiguous()
            sae.b_dec.data.normal_(std=0.1)
    return sae


def activations(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("norm", ["none", "layer_norm", "constant_norm_rescale"])
def test_reconstruct_is_forward(norm) -> None:
    sae = make(normalize_activations=norm)
    before = dict(vars(sae))
    x = activations(3, 5, D_MODEL)
    adapter = adapt(sae)
    assert type(adapter).__name__ == "OwnCodecAdapter"
    self_check(sae, adapter, x)
    torch.testing.assert_close(adapter.reconstruct(x), sae.forward(x), atol=1e-5, rtol=1e-5)
    assert vars(sae).keys() == before.keys()


def test_hook_z() -> None:
    sae = make(hook="blocks.1.attn.hook_z", reshape_activations="hook_z")
    heads = activations(2, 4, 4, D_MODEL // 4)
    self_check(sae, adapt(sae), heads)
    found = adapt(sae).reconstruct(heads.flatten(2))
    torch.testing.assert_close(found, sae.forward(heads).flatten(2), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("coding", [NATIVE, Coding(4)])
def test_codes_and_pools(coding) -> None:
    sae = make()
    x = activations(2, 5, D_MODEL)
    mask = torch.rand(D_SAE, generator=torch.Generator().manual_seed(1)) < 0.5
    codes = adapt(sae).encode(x, coding, Pool(mask).bits(torch.device("cpu")))
    dense = sae.encode(x).reshape(10, D_SAE).detach()
    assert codes.pooled is not None
    for found, rows in ((codes.features, dense), (codes.pooled, dense * mask)):
        if coding.k is not None:
            order = rows.abs().argsort(dim=1, descending=True, stable=True)[:, : coding.k]
            rows = torch.zeros_like(rows).scatter(1, order, rows.gather(1, order))
        torch.testing.assert_close(found.to_dense(D_SAE), rows)


def test_random_decoder_takes_the_place_of_the_rows() -> None:
    sae = make(normalize_activations="layer_norm")
    adapter = adapt(sae)
    rows = random_decoder(adapter, seed=0).decoder
    x = activations(1, 6, D_MODEL)
    codes = adapter.encode(x)
    found = adapter.decode(codes.features, codes.token_map, rows)
    dense = codes.features.to_dense(D_SAE)
    assert rows is not None
    std, mean = x[0].std(dim=-1, keepdim=True), x[0].mean(dim=-1, keepdim=True)
    expected = (dense @ rows + sae.b_dec) * std + mean
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


def test_a_certificate_is_about_the_class_s_own_forward() -> None:
    model, sae = hooked_transformer(), make()
    evaluation = make_tokens(20, seed=2)
    certificate = certify(
        model, sae, calibration=make_tokens(20, seed=1), evaluation=evaluation, config=CONFIG
    )
    logits = model.run_with_hooks(
        evaluation,
        fwd_hooks=[("blocks.1.hook_resid_post", lambda x, hook: sae.forward(x))],  # noqa: ARG005
    )
    p = logits[:, :-1].double().softmax(-1).gather(-1, evaluation[:, 1:, None])[..., 0]
    loss = -torch.log2(0.5 * p + 0.5 / logits.shape[-1]).mean(dim=1)
    np.testing.assert_allclose(
        np.sort(certificate.column("loss_sae")), np.sort(loss.detach().numpy()), atol=1e-4
    )
    assert certificate.manifest["sae"]["encoder"] == "OwnCodecAdapter"


def test_from_a_folder(tmp_path) -> None:
    sae = make()
    sae.save_model(tmp_path)
    x = activations(1, 3, D_MODEL)
    torch.testing.assert_close(adapt(load_sae(tmp_path)[0]).reconstruct(x), sae.forward(x))


@pytest.mark.parametrize("length", [8, 65, 128, 300])
def test_codes_that_depend_on_the_batch_are_refused(length) -> None:
    sae = make(BatchRanked)
    sizes = torch.tensor([0.3, 1.0, 2.0, 3.0])[:, None, None]  # sequences compete for the features
    with pytest.raises(CertifyError, match="depend on which other sequences"):
        self_check(sae, adapt(sae), sizes * activations(4, length, D_MODEL))


def test_several_threads_share_an_sae_that_encodes_itself() -> None:
    """SAELens's encode and decode keep state on the module; here on a copy, one thread at a time."""
    sae = make(normalize_activations="layer_norm")
    before = dict(vars(sae))
    hooks = dict(proxy_hooks(sae))["blocks.1.hook_resid_post"]
    inputs = [activations(1, 4 + i, D_MODEL) for i in range(4)]
    expected = [sae.forward(x) for x in inputs]
    wrong: list[object] = []

    def work(i: int) -> None:
        try:
            for _ in range(100):
                found = hooks(inputs[i], hook=None)
                assert found is not None
                torch.testing.assert_close(found, expected[i], atol=1e-4, rtol=1e-4)
        except Exception as error:
            wrong.append(error)

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(interval)
    assert not wrong
    assert vars(sae).keys() == before.keys()


def test_hooks_of_the_user_on_the_sae_take_no_part() -> None:
    sae = make()
    x = activations(2, 5, D_MODEL)
    expected = adapt(sae).reconstruct(x)
    fired: list[int] = []

    def ablate(acts: Tensor, hook: Any) -> Tensor:  # noqa: ARG001
        fired.append(1)
        return acts * 0

    sae.add_hook("hook_sae_acts_post", ablate)
    torch.testing.assert_close(adapt(sae).reconstruct(x), expected)
    assert not fired
    sae.encode(x)
    assert fired, "the user's own call still runs it"


def test_a_forward_that_is_more_than_decode_of_encode_is_refused() -> None:
    sae = make(AddsMore)
    with pytest.raises(CertifyError, match="does not reproduce"):
        self_check(sae, adapt(sae), activations(4, 8, D_MODEL))


def test_unfolded_normalisation_is_refused() -> None:
    with pytest.raises(CertifyError, match="expected_average_only_in"):
        adapt(make(normalize_activations="expected_average_only_in"))
