from typing import Any

from numpy.typing import NDArray

def isa() -> str: ...
def set_isa(name: str) -> None: ...
def available_isas() -> list[str]: ...

class Arena:
    def __init__(self, bytes: int) -> None: ...

def lanes_from_plain(plain: NDArray[Any], lanes: NDArray[Any], halo: int, threads: int) -> None: ...
def lanes_to_plain(lanes: NDArray[Any], plain: NDArray[Any], halo: int, threads: int) -> None: ...
def fill_halo(lanes: NDArray[Any], height: int, width: int, halo: int, mode: int, pad: int, threads: int) -> None: ...
def fold_halo(lanes: NDArray[Any], height: int, width: int, halo: int, mode: int, pad: int, threads: int) -> None: ...
def fma_peak(threads: int, seconds: float) -> float: ...
def copy_bandwidth(bytes: int, threads: int, seconds: float) -> float: ...
def adam_step(
    values: NDArray[Any],
    gradient: NDArray[Any],
    m: NDArray[Any],
    v: NDArray[Any],
    step: int,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    threads: int,
) -> None: ...
def sgd_step(
    values: NDArray[Any],
    gradient: NDArray[Any],
    momentum_buffer: NDArray[Any],
    step: int,
    lr: float,
    momentum: float,
    dampening: float,
    weight_decay: float,
    nesterov: bool,
    threads: int,
) -> None: ...
