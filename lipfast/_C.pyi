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

class Pruning:
    def __init__(self, scores: list[NDArray[Any]], alive: list[NDArray[Any]], count: int, threads: int) -> None: ...
    @property
    def living(self) -> int: ...
    @property
    def nan_part(self) -> int: ...
    def write(
        self,
        masks: list[NDArray[Any]] | None,
        bits: list[NDArray[Any]] | None,
        start: list[NDArray[Any]] | None,
        dense: list[NDArray[Any]] | None,
        values: NDArray[Any] | None,
        threads: int,
    ) -> None: ...

def count_ones(mask: NDArray[Any], threads: int) -> int: ...
def gather_kept(dense: NDArray[Any], mask: NDArray[Any], values: NDArray[Any], threads: int) -> None: ...
def scatter_kept(values: NDArray[Any], mask: NDArray[Any], dense: NDArray[Any], threads: int) -> None: ...

class Conv:
    def __init__(
        self,
        out_channels: int,
        in_channels: int,
        groups: int,
        kernel: tuple[int, int],
        stride: int,
        dilation: int,
        pad: tuple[int, int],
        padding_mode: int,
        batch_height_width: tuple[int, int, int],
        out_block: tuple[int, int],
        mask: NDArray[Any] | None,
        choice: int,
        exact: bool,
    ) -> None: ...
    @property
    def kept(self) -> int: ...
    @property
    def out_size(self) -> tuple[int, int]: ...
    @property
    def input_halo(self) -> int: ...
    @property
    def gradient_halo(self) -> int: ...
    @property
    def kernels(self) -> tuple[str, str, str]: ...
    def scratch_floats(self, threads: int) -> int: ...
    def forward(
        self,
        values: NDArray[Any],
        bias: NDArray[Any] | None,
        x: NDArray[Any],
        x_halo: int,
        y: NDArray[Any],
        y_halo: int,
        scratch: NDArray[Any],
        threads: int,
    ) -> None: ...
    def input_gradient(
        self,
        values: NDArray[Any],
        dy: NDArray[Any],
        dy_halo: int,
        dx: NDArray[Any],
        dx_halo: int,
        scratch: NDArray[Any],
        threads: int,
    ) -> None: ...
    def weight_gradient(
        self,
        x: NDArray[Any],
        x_halo: int,
        dy: NDArray[Any],
        dy_halo: int,
        dvalues: NDArray[Any],
        dbias: NDArray[Any] | None,
        scratch: NDArray[Any],
        threads: int,
    ) -> None: ...
