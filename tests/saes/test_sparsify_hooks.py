"""sparsify's hookpoints are Hugging Face modules: the hooks chosen for them see what these compute."""

from __future__ import annotations

import copy
import functools
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from engine.builders import D_MODEL, D_VOCAB, MODEL_CLASSES, N_LAYERS, make_tokens, of_class
from engine.builders import _bridge as bridge
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
)

from saelens_certify.errors import CertifyError
from saelens_certify.saes.hookpoints import Hooks, check_hookpoint, hooks_of
from saelens_certify.saes.processing import check_processing
from saelens_certify.saes.sparsify import load_sparsify
from saes.sparsify_files import checkpoint, write

SIZES: dict[str, Any] = {
    "vocab_size": D_VOCAB, "hidden_size": D_MODEL, "num_hidden_layers": N_LAYERS,
    "num_attention_heads": 4, "max_position_embeddings": 64, "initializer_range": 0.3,
    "bos_token_id": 0, "eos_token_id": 1,
}  # fmt: skip
TOKENS = make_tokens(3, seed=5)


def check(model: Any, sae: Any) -> None:
    """What preflight checks of these."""
    check_hookpoint(model, sae.cfg)
    check_processing(model, sae.cfg)


@functools.cache
def models(family: str) -> tuple[Any, Any]:
    """The same weights as they are in transformers, and in a TransformerBridge."""
    torch.manual_seed(0)
    if family == "gpt2":
        model: Any = GPT2LMHeadModel(
            GPT2Config(vocab_size=D_VOCAB, n_embd=D_MODEL, n_layer=N_LAYERS, n_head=4,
                       n_positions=64, initializer_range=0.3)
        )  # fmt: skip
    elif family == "llama":
        model = LlamaForCausalLM(LlamaConfig(**SIZES, intermediate_size=64, num_key_value_heads=2))
    elif family == "gemma2":
        model = Gemma2ForCausalLM(
            Gemma2Config(**SIZES, intermediate_size=64, num_key_value_heads=2, head_dim=8)
        )
    else:
        parallel = family == "pythia"
        model = GPTNeoXForCausalLM(
            GPTNeoXConfig(**SIZES, intermediate_size=64, use_parallel_residual=parallel)
        )
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name or "ln_" in name:  # else the norms' weights would be all alike
                parameter.add_(0.3 * torch.randn_like(parameter))
    return copy.deepcopy(model).eval(), bridge(model, f"tiny-{family}")


ATTENTION = {"gpt2": "attn", "llama": "self_attn", "gemma2": "self_attn"}
EMBEDDING = {"gpt2": "wte", "llama": "embed_tokens"}
FAMILIES = ["gpt2", "llama", "pythia", "gpt-neox, sequential"]


def hookpoints(family: str) -> list[str]:
    layer = "h.1" if family == "gpt2" else "layers.1"
    return [layer, f"{layer}.mlp", f"{layer}.{ATTENTION.get(family, 'attention')}"]


@torch.no_grad()
def module_calls(model: Any, hookpoint: str) -> tuple[Tensor | None, Tensor]:
    """First input and first output of a module, as sparsify's trainer finds it."""
    seen: dict[str, Any] = {}

    def hook(_: Any, args: Any, kwargs: Any, output: Any) -> None:
        seen["input"] = args[0] if args else kwargs.get("hidden_states")
        seen["output"] = output[0] if isinstance(output, tuple) else output

    handle = model.base_model.get_submodule(hookpoint).register_forward_hook(hook, with_kwargs=True)
    model(TOKENS)
    handle.remove()
    return seen["input"], seen["output"]


@torch.no_grad()
def activations(model: Any, *names: str) -> list[Tensor]:
    seen: dict[str, Tensor] = {}

    def hook(activation: Tensor, hook: Any, name: str) -> None:  # noqa: ARG001
        seen[name] = activation.clone()

    model.run_with_hooks(TOKENS, fwd_hooks=[(n, functools.partial(hook, name=n)) for n in names])
    return [seen[name] for name in names]


@contextmanager
def replaced_output(module: Any, transcode: bool, compute: Any) -> Iterator[None]:
    """Give a module's output another value while the block runs."""

    def hook(_: Any, args: Any, kwargs: Any, output: Any) -> Any:
        first, *rest = output if isinstance(output, tuple) else (output,)
        given = (args[0] if args else kwargs["hidden_states"]) if transcode else first
        new = compute(given)
        return (new, *rest) if isinstance(output, tuple) else new

    handle = module.register_forward_hook(hook, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


@pytest.mark.parametrize("family", FAMILIES)
def test_hooks_see_what_the_module_reads_and_returns(family: str) -> None:
    hf_model, model = models(family)
    for hookpoint in hookpoints(family):
        module_input, module_output = module_calls(hf_model, hookpoint)
        hooks = hooks_of(hookpoint, transcode=True)
        read, returned = activations(model, hooks.input, hooks.output)
        torch.testing.assert_close(read, module_input, atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(returned, module_output, atol=1e-5, rtol=1e-4)
        assert hooks_of(hookpoint, transcode=False).output == hooks.output
    embedding = EMBEDDING.get(family, "embed_in")
    (embedded,) = activations(model, hooks_of(embedding, transcode=False).output)
    torch.testing.assert_close(embedded, module_calls(hf_model, embedding)[1])


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("transcode", [False, True])
def test_splicing_there_is_replacing_the_module_s_output(
    family: str, transcode: bool, tmp_path: Path
) -> None:
    hf_model, model = models(family)
    for hookpoint in hookpoints(family):
        coder = checkpoint(D_MODEL, k=6, transcode=transcode, skip_connection=transcode)
        sae = load_sparsify(write(coder, tmp_path / family / hookpoint))
        metadata, seen = sae.cfg.metadata, {}

        def read(activation: Tensor, hook: Any, seen: Any = seen) -> None:  # noqa: ARG001
            seen["input"] = activation

        def put(activation: Tensor, hook: Any, seen: Any = seen, sae: Any = sae) -> Tensor:  # noqa: ARG001
            return sae(seen["input"])

        hooks = [(metadata.hook_name, read), (metadata.hook_name_out or metadata.hook_name, put)]
        with torch.no_grad():
            spliced = model.run_with_hooks(TOKENS, return_type="logits", fwd_hooks=hooks)
            module = hf_model.base_model.get_submodule(hookpoint)

            def reference(given: Tensor, coder: Any = coder) -> Tensor:
                return coder.forward(given.flatten(0, 1)).reshape(given.shape).float()

            with replaced_output(module, transcode, reference):
                expected = hf_model(TOKENS).logits
            untouched = hf_model(TOKENS).logits
        torch.testing.assert_close(spliced, expected, atol=1e-3, rtol=1e-3)
        assert (expected - untouched).abs().max() > 0.1


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_mlp_input_on_a_hooked_sae_transformer(family: str) -> None:
    model = of_class("HookedSAETransformer", family)
    seen: list[Tensor] = []
    handle = model.blocks[1].mlp.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    (read,) = activations(model, hooks_of("layers.1.mlp", transcode=True).input)
    handle.remove()
    assert torch.equal(read, seen[0])


def test_norms_after_a_module_are_told_apart(tmp_path: Path) -> None:
    hf_model, model = models("gemma2")
    for hookpoint, inner in (("layers.1.mlp", "mlp"), ("layers.1.self_attn", "attn")):
        returned = module_calls(hf_model, hookpoint)[1]
        after_norm, before = activations(
            model, hooks_of(hookpoint, transcode=True).output, f"blocks.1.{inner}.hook_out"
        )
        assert not torch.allclose(after_norm, returned, atol=0.1)
        torch.testing.assert_close(before, returned, atol=1e-5, rtol=1e-4)
        for transcode, key in ((False, "hook_name"), (True, "hook_name_out")):
            coder = checkpoint(D_MODEL, transcode=transcode)
            sae = load_sparsify(write(coder, tmp_path / str(transcode) / hookpoint))
            with pytest.raises(CertifyError, match=rf"sparsify.*\.{key} = 'blocks\.1\.{inner}"):
                check(model, sae)
            setattr(sae.cfg.metadata, key, f"blocks.1.{inner}.hook_out")
            check(model, sae)
    residual = load_sparsify(write(checkpoint(D_MODEL), tmp_path / "layers.1"))
    check(model, residual)


def test_norms_after_a_module_on_a_hooked_transformer(tmp_path: Path) -> None:
    sae = load_sparsify(write(checkpoint(D_MODEL), tmp_path / "layers.0.mlp"))
    block = torch.nn.ModuleDict({"ln2_post": torch.nn.Identity()})
    with pytest.raises(CertifyError, match="use a TransformerBridge"):
        check(SimpleNamespace(blocks=[block]), sae)
    check(of_class("HookedTransformer"), sae)


@pytest.mark.parametrize("family", ["gpt2", "llama", "pythia"])
def test_processed_weights_are_refused(family: str, tmp_path: Path) -> None:
    hf_model, untouched = models(family)
    model = bridge(copy.deepcopy(hf_model), f"tiny-{family}")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.enable_compatibility_mode()
    for hookpoint in hookpoints(family):
        for transcode in (False, True):
            hooks = hooks_of(hookpoint, transcode)
            coder = checkpoint(D_MODEL, transcode=transcode)
            sae = load_sparsify(write(coder, tmp_path / str(transcode) / hookpoint))
            check(untouched, sae)
            names = hooks.input, hooks.output
            same = all(
                torch.allclose(before, after, atol=1e-3)
                for before, after in zip(
                    activations(untouched, *names), activations(model, *names), strict=True
                )
            )
            if same:  # the residual stream and outputs of a Llama: RMS norms are not centred
                assert family == "llama"
                check(model, sae)
            else:
                with pytest.raises(CertifyError, match="enable_compatibility_mode"):
                    check(model, sae)


def test_processed_weights_of_a_hooked_transformer_are_refused(tmp_path: Path) -> None:
    model = copy.deepcopy(of_class("HookedSAETransformer"))
    autoencoder = load_sparsify(write(checkpoint(D_MODEL), tmp_path / "layers.0"))
    folder = write(checkpoint(D_MODEL, transcode=True), tmp_path / "layers.0.mlp")
    transcoder = load_sparsify(folder)
    check(model, autoencoder)
    check(model, transcoder)
    state = model.state_dict()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.load_and_process_state_dict(state, fold_ln=True, center_writing_weights=False)
    check(model, autoencoder)
    with pytest.raises(CertifyError, match=r"folded.*from_pretrained_no_processing"):
        check(model, transcoder)
    model = copy.deepcopy(of_class("HookedSAETransformer"))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.load_and_process_state_dict(state, fold_ln=False, center_writing_weights=True)
    for sae in (autoencoder, transcoder):
        with pytest.raises(CertifyError, match=r"centred.*from_pretrained_no_processing"):
            check(model, sae)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("width", [16, 768, 4096])
def test_centred_weights_are_told_from_others(
    dtype: torch.dtype, width: int, tmp_path: Path
) -> None:
    sae = load_sparsify(write(checkpoint(), tmp_path / "layers.0"))
    random = torch.randn(256, width, generator=torch.Generator().manual_seed(0))
    means = random.mean(dim=-1, keepdim=True)
    # Weight decay makes means small where a layer norm hides them; that does no harm.
    for rows, centred in ((random, False), (random - 0.9 * means, False), (random - means, True)):
        mlp = SimpleNamespace(W_out=rows.to(dtype))
        model = SimpleNamespace(blocks=[SimpleNamespace(mlp=mlp)])
        if centred:
            with pytest.raises(CertifyError, match="centred"):
                check(model, sae)
        else:
            check(model, sae)


def test_hooks_that_only_some_model_classes_have(tmp_path: Path) -> None:
    coder = checkpoint(D_MODEL, transcode=True)
    mlp = load_sparsify(write(coder, tmp_path / "layers.0.mlp"))
    attention = load_sparsify(write(coder, tmp_path / "layers.0.attn"))
    layer = load_sparsify(write(coder, tmp_path / "layers.0"))
    for model_class in MODEL_CLASSES:
        model = of_class(model_class)
        check(model, layer)
        if model_class == "HookedTransformer":
            with pytest.raises(CertifyError, match="TransformerBridge or HookedSAETransformer"):
                check(model, mlp)
        else:
            check(model, mlp)
        if "Bridge" in model_class:
            check(model, attention)
        else:
            with pytest.raises(CertifyError, match=f"TransformerBridge; a {model_class} has no"):
                check(model, attention)


@pytest.mark.parametrize("family", FAMILIES)
def test_other_models_pass(family: str, tmp_path: Path) -> None:
    for hookpoint in hookpoints(family):
        sae = load_sparsify(write(checkpoint(D_MODEL), tmp_path / family / hookpoint))
        check(models(family)[1], sae)
        # SAEs of other libraries name their hooks themselves.
        sae.cfg.metadata.sparsify_hookpoint = None
        check(models("gemma2")[1], sae)


@given(
    prefix=st.sampled_from(["", "model.", "transformer.", "gpt_neox."]),
    layers=st.sampled_from(["layers", "h"]),
    layer=st.integers(0, 200),
    module=st.sampled_from(["", ".mlp", ".attn", ".self_attn", ".attention"]),
    transcode=st.booleans(),
)
def test_every_known_path(
    prefix: str, layers: str, layer: int, module: str, transcode: bool
) -> None:
    hookpoint = f"{prefix}{layers}.{layer}{module}"
    hooks = hooks_of(hookpoint, transcode)
    output = {"": "hook_resid_post", ".mlp": "hook_mlp_out"}.get(module, "hook_attn_out")
    assert hooks.output == f"blocks.{layer}.{output}"
    assert hooks.hf_output == f"{hookpoint}.output"
    if transcode:
        read = {"": "hook_resid_pre", ".mlp": "mlp.hook_in"}.get(module, "attn.hook_in")
        assert hooks.input == f"blocks.{layer}.{read}"
        assert hooks.hf_input == f"{hookpoint}.input"
    else:
        assert (hooks.input, hooks.hf_input) == (hooks.output, hooks.hf_output)


@pytest.mark.parametrize(
    "hookpoint",
    ["layers", "layers.x", "layers.1.mlp.down_proj", "layers.1.input_layernorm", "my-sae", "",
     "encoder.layers.1", "layers.-1", "1", "hook_", "layers.1.mlp/"],
)  # fmt: skip
@pytest.mark.parametrize("transcode", [False, True])
def test_unknown_paths_are_refused(hookpoint: str, transcode: bool) -> None:
    with pytest.raises(CertifyError, match="pass hookpoint="):
        hooks_of(hookpoint, transcode)


def test_autoencoders_may_name_a_transformer_lens_hook() -> None:
    for name in ("blocks.5.hook_resid_post", "blocks.0.mlp.hook_out", "hook_embed"):
        assert hooks_of(name, transcode=False) == Hooks(name, name)
        with pytest.raises(CertifyError, match="the module whose input it encodes"):
            hooks_of(name, transcode=True)
    with pytest.raises(CertifyError):
        hooks_of("embed_tokens", transcode=True)
