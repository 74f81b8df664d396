"""Take the compiled operator out of a call of its public face.

On a GPU the face's checks wait for the device; what the kernels take is seen only without them.
The arguments are those that the face really passes, so this needs no knowledge of schemas.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

_NAMESPACE = "saelens_certify"


class _Recorder(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, tuple[Any, ...], dict[str, Any]]] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:  # fmt: skip
        if func.namespace == _NAMESPACE:
            self.calls.append((func, args, kwargs or {}))
        return func(*args, **(kwargs or {}))


def operator_calls(face: Callable[[], object]) -> Callable[[], object] | None:
    """Run a face once and return a function that repeats only its calls of compiled operators.

    Args:
        face: Calls one or more operators of this package.

    Returns:
        The function, which returns the last operator's result; None if the face ran in plain torch.
    """
    with torch.no_grad(), _Recorder() as recorder:
        face()
    calls = recorder.calls
    if not calls:
        return None

    def replay() -> object:
        result: object = None
        with torch.no_grad():
            for func, args, kwargs in calls:
                result = func(*args, **kwargs)
        return result

    return replay
