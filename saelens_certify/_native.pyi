"""Torch-free core, compiled from csrc/."""

import numpy as np
from numpy.typing import NDArray

def build_info() -> dict[str, str]: ...
def exact_sum(values: NDArray[np.float64], rounding: str = "nearest") -> float: ...
def exact_mean(values: NDArray[np.float64], rounding: str = "nearest") -> float: ...
def wealth(
    values: NDArray[np.float64],
    limits: NDArray[np.float64] | None,
    mean: float,
    caps: NDArray[np.float64],
) -> tuple[NDArray[np.float64], NDArray[np.int64]]: ...
