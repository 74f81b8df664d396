"""A Hugging Face cache filled by hand: SAELens's and the hub's own code run on it, without a network."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import constants
from sae_lens.loading.pretrained_saes_directory import get_pretrained_saes_directory
from safetensors.torch import save
from torch import Tensor

_COMMIT = "0" * 40


class HubCache:
    """Repositories as the hub's client finds them after it has downloaded them."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def add(self, repository: str, path: str, content: bytes | dict[str, Any]) -> Path:
        """Put a file into a repository; a dict becomes JSON."""
        home = self.root / f"models--{repository.replace('/', '--')}"
        (home / "refs").mkdir(parents=True, exist_ok=True)
        (home / "refs" / "main").write_text(_COMMIT)
        file = home / "snapshots" / _COMMIT / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(content if isinstance(content, bytes) else json.dumps(content).encode())
        return file

    def add_sae(self, release: str, sae_id: str, sae: Any, **settings: Any) -> None:
        """Put an SAE in SAELens's format where a registered release, or a repository, has it."""
        repository, folder = located(release, sae_id)
        self.add(repository, f"{folder}/cfg.json", sae.cfg.to_dict() | settings)
        self.add(repository, f"{folder}/sae_weights.safetensors", save(dict(sae.state_dict())))

    def add_pickled(self, repository: str, path: str, tensors: dict[str, Tensor]) -> None:
        """Put a pickled checkpoint into a repository."""
        buffer = io.BytesIO()
        torch.save(tensors, buffer)
        self.add(repository, path, buffer.getvalue())


def located(release: str, sae_id: str) -> tuple[str, str]:
    """Return repository and folder of a published SAE."""
    entry = get_pretrained_saes_directory().get(release)
    return (release, sae_id) if entry is None else (entry.repo_id, entry.saes_map[sae_id])


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> HubCache:
    """An empty cache; what is not put there cannot be had."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    return HubCache(tmp_path / "hub")
