"""The second device refuses and allows what a GPU does."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor

from engine import second_device
from engine.second_device import SECOND, THIRD

pytestmark = pytest.mark.usefixtures("_second_device")


@pytest.fixture(scope="module")
def _second_device() -> None:
    second_device.load()


def away(*shape: int) -> Tensor:
    return torch.ones(shape).to(SECOND)


MIXED = {
    "add": lambda: away(3) + torch.ones(3),
    "add to CPU": lambda: torch.ones(3) + away(3),
    "in place": lambda: torch.ones(()).add_(away(3)[0]),
    "number from a device": lambda: torch.ones(3) * away(3)[0],
    "other index": lambda: away(3) + torch.ones(3).to(THIRD),
    "matrices": lambda: away(2, 3) @ torch.ones(3, 2),
    "matrix on CPU": lambda: torch.ones(2, 3) @ away(3, 2),
    "layer": lambda: torch.nn.functional.linear(away(2, 3), torch.ones(4, 3)),
    "embedding": lambda: torch.nn.functional.embedding(torch.zeros(2).long(), away(3, 4)),
    "norm": lambda: torch.nn.functional.layer_norm(away(2, 3), (3,), torch.ones(3)),
    "cat": lambda: torch.cat([away(2), torch.ones(2)]),
    "where": lambda: torch.where(torch.ones(3) > 0, away(3), away(3)),
    "gather": lambda: away(3).gather(0, torch.zeros(3).long()),
    "index of CPU": lambda: torch.ones(3)[away(3).long()],
    "mask of CPU": lambda: torch.ones(3)[away(3) > 0],
    "put": lambda: away(3).index_put_((torch.zeros(2).long(),), torch.ones(2)),
    "scatter": lambda: torch.zeros(3).scatter_(0, away(3).long(), away(3)),
    "search": lambda: torch.searchsorted(away(3), torch.ones(3)),
    "generator": lambda: torch.randn(3, generator=torch.Generator(), device=SECOND),
    "numpy": lambda: away(3).numpy(),
}


@pytest.mark.parametrize("what", MIXED)
def test_what_a_gpu_refuses_is_refused(what) -> None:
    message = "same device|indices should be either on|device type for generator|numpy"
    with pytest.raises((RuntimeError, TypeError), match=message):
        MIXED[what]()


def test_what_a_gpu_allows_is_allowed() -> None:
    x = torch.arange(12.0).reshape(3, 4)
    there = x.to(SECOND)
    assert str(there.device) == SECOND
    assert there.to(THIRD).cpu().equal(x)
    rows = torch.tensor([2, 0])
    assert there[rows].device == there.device
    for found, expected in [
        (there + torch.tensor(1.0), x + 1),
        (there[rows], x[rows]),
        (there[x[:, 0] > 3], x[x[:, 0] > 3]),
        ((there @ there.T).softmax(-1), (x @ x.T).softmax(-1)),
        (there.view(-1)[1:5].sort(descending=True).values, x.view(-1)[1:5].flip(0)),
    ]:
        assert torch.equal(found.cpu(), expected)
    there[1] = torch.zeros(4)  # a copy crosses devices
    there.view(-1)[-1] = -1.0
    x[1], x[2, 3] = 0, -1
    assert torch.equal(there.cpu(), x)
    assert torch.equal(copy.deepcopy(there).cpu(), x)
    out = torch.empty(0, device=SECOND)
    torch.add(there, 1, out=out)
    assert torch.equal(out.cpu(), x + 1)
