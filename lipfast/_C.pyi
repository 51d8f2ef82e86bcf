from typing import Any

import numpy as np
from numpy.typing import NDArray

def isa() -> str: ...
def set_isa(name: str) -> None: ...
def available_isas() -> list[str]: ...
def same_entries(record: list[Any], versions: NDArray[np.uint64]) -> bool: ...

class Arena:
    def __init__(self, bytes: int, zeroed: bool) -> None: ...

def lanes_from_plain(plain: NDArray[Any], lanes: NDArray[Any], halo: int, threads: int) -> None: ...
def lanes_to_plain(lanes: NDArray[Any], plain: NDArray[Any], halo: int, threads: int) -> None: ...
def fill_halo(lanes: NDArray[Any], height: int, width: int, halo: int, mode: int, pad: int, threads: int) -> None: ...
def copy_pixels(
    source: NDArray[Any], source_halo: int, to: NDArray[Any], to_halo: int, height: int, width: int, threads: int
) -> None: ...
def fma_peak(threads: int, seconds: float) -> float: ...
def copy_bandwidth(bytes: int, threads: int, seconds: float) -> float: ...
def core_round_trip(seconds: float) -> float: ...
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
def add_noise(base: NDArray[Any], scale: float, seed: int, step: int, to: NDArray[Any], threads: int) -> None: ...

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

def fingerprint(arrays: list[NDArray[Any]], threads: int) -> int: ...

class AxisTable:
    def __init__(self, first: list[int], second: list[int], weight: list[float]) -> None: ...

# conv, values, bias, epsilon, offsets, act, slope
_FinishedConv = tuple[int, int, int, float, list[int], int, float]

class Program:
    def __init__(self, keeps_weights: bool) -> None: ...
    def values(self) -> NDArray[Any]: ...
    def gradients(self) -> NDArray[Any]: ...
    def statistics(self) -> NDArray[Any]: ...
    def bytes(self) -> int: ...
    def allocate(self, map_floats: int, value_count: int, statistic_count: int) -> None: ...
    def add_map(
        self, offset: int, shape: list[int], grid: int, block_h: int, block_w: int, halo: int, plane: int
    ) -> int: ...
    def add_channels(self, whole: int, first: int, last: int, step: int) -> int: ...
    def add_conv(
        self, shape: list[int], geometry: list[int], padding: int, mask: NDArray[Any] | None, kernel: int, exact: bool
    ) -> int: ...
    def conv_kernels(self, conv: int) -> tuple[str, str, str]: ...
    def gradient_halo(self, conv: int) -> int: ...
    def from_plain(self, section: int, plain: int, map: int) -> None: ...
    def to_plain(self, section: int, map: int, plain: int) -> None: ...
    def clear(self, section: int, map: int) -> None: ...
    def fill_halo(self, section: int, map: int, mode: int, pad: int) -> None: ...
    def reblock(self, section: int, source: int, to: int) -> None: ...
    def flatten(self, section: int, map: int, rows: int, to_map: bool) -> None: ...
    def conv_forward(
        self, conv: int, values: int, bias: int, x: int, y: int, fill: bool, mode: int, pad: int
    ) -> None: ...
    def conv_finish(
        self, conv: _FinishedConv, x: int, residual: int, y: int, fill: bool, mode: int, pad: int
    ) -> None: ...
    def is_pair(self, first: int, second: int) -> bool: ...
    def conv_pair(
        self,
        first: _FinishedConv,
        second: _FinishedConv,
        x: int,
        halo: int,
        plane: int,
        between_fill: bool,
        between_mode: int,
        between_pad: int,
        y: int,
        fill: bool,
        mode: int,
        pad: int,
    ) -> None: ...
    def conv_input_gradient(self, conv: int, values: int, dy: int, dx: int) -> None: ...
    def conv_weight_gradient(self, conv: int, values: int, bias: int, x: int, dy: int) -> None: ...
    def norm_forward(
        self,
        x: int,
        y: int,
        epsilon: float,
        momentum: float,
        act: int,
        slope: float,
        offsets: list[int],
        training: bool,
        fill: bool,
        mode: int,
        pad: int,
        recover: bool,
    ) -> None: ...
    def norm_backward(
        self,
        x: int,
        dy: int,
        dy2: int,
        dx: int,
        epsilon: float,
        act: int,
        slope: float,
        offsets: list[int],
        training: bool,
        zero_halo: bool,
        recover: bool,
    ) -> None: ...
    def group_norm(
        self,
        x: int,
        y: int,
        groups: int,
        epsilon: float,
        act: int,
        slope: float,
        offsets: list[int],
        fill: bool,
        mode: int,
        pad: int,
    ) -> None: ...
    def group_norm_backward(
        self, x: int, dy: int, dx: int, groups: int, epsilon: float, act: int, slope: float, offsets: list[int]
    ) -> None: ...
    def finish(
        self,
        section: int,
        x: int,
        residual: int,
        factor: int,
        y: int,
        epsilon: float,
        offsets: list[int],
        act: int,
        slope: float,
        fill: bool,
        mode: int,
        pad: int,
    ) -> None: ...
    def prelu(self, x: int, y: int, slopes: int, step: int) -> None: ...
    def prelu_backward(self, x: int, dy: int, dx: int, slopes: int, step: int, accumulate: bool) -> None: ...
    def total(self, value: int, a: int, b: int) -> None: ...
    def dot_channels(self, section: int, a: int, b: int, scale: float, y: int, accumulate: bool) -> None: ...
    def largest_channel(self, x: int, y: int) -> None: ...
    def largest_channel_backward(self, x: int, dy: int, dx: int, shared: bool, accumulate: bool) -> None: ...
    def response_norm(self, x: int, y: int, epsilon: float) -> None: ...
    def response_norm_backward(self, x: int, dy: int, dx: int, epsilon: float, accumulate: bool) -> None: ...
    def activate(self, x: int, y: int, act: int, slope: float) -> None: ...
    def activate_backward(self, x: int, dy: int, dx: int, act: int, slope: float, accumulate: bool) -> None: ...
    def combine(self, section: int, a: int, a_scale: float, b: int, b_scale: float, shift: float, y: int) -> None: ...
    def layer_norm(self, x: int, y: int, epsilon: float, centred: bool, gamma: int, beta: int) -> None: ...
    def layer_norm_backward(
        self, x: int, dy: int, dx: int, epsilon: float, centred: bool, gamma: int, beta: int, accumulate: bool
    ) -> None: ...
    def channel_attention(
        self,
        query: int,
        key: int,
        value: int,
        seen: int,
        sizes: list[int],
        pictures: NDArray[Any],
        firsts: list[NDArray[Any]],
        scales: tuple[float, float],
        factors: tuple[int, bool],
    ) -> None: ...
    def channel_attention_backward(
        self,
        query: int,
        key: int,
        value: int,
        dy: int,
        dquery: int,
        dkey: int,
        dvalue: int,
        sizes: list[int],
        pictures: NDArray[Any],
        firsts: list[NDArray[Any]],
        scales: tuple[float, float],
        factors: tuple[int, bool],
    ) -> None: ...
    def attention(
        self,
        query: int,
        key: int,
        value: int,
        seen: int,
        sizes: list[int],
        places: list[tuple[NDArray[Any], NDArray[Any]]],
        scales: tuple[float, float],
        safe: bool,
        factors: tuple[int, bool],
        biases: list[tuple[int, int, NDArray[Any], bool]],
    ) -> None: ...
    def attention_backward(
        self,
        query: int,
        key: int,
        value: int,
        dy: int,
        dquery: int,
        dkey: int,
        dvalue: int,
        sizes: list[int],
        places: list[tuple[NDArray[Any], NDArray[Any]]],
        scales: tuple[float, float],
        safe: bool,
        factors: tuple[int, bool],
        biases: list[tuple[int, int, NDArray[Any], bool]],
    ) -> None: ...
    def pixel_norm(self, x: int, y: int, epsilon: float) -> None: ...
    def pixel_norm_backward(self, x: int, dy: int, dx: int, epsilon: float, accumulate: bool) -> None: ...
    def upsample2(self, bilinear: bool, x: int, y: int) -> None: ...
    def upsample2_backward(self, bilinear: bool, dy: int, dx: int, accumulate: bool) -> None: ...
    def resample(self, x: int, y: int, rows: AxisTable, columns: AxisTable) -> None: ...
    def resample_backward(self, dy: int, dx: int, rows: AxisTable, columns: AxisTable) -> None: ...
    def pool(
        self,
        x: int,
        y: int,
        kernel: int,
        stride: int,
        pad: int,
        counted: int,
        maximum: bool,
        fill: bool,
        mode: int,
        halo_pad: int,
    ) -> None: ...
    def pool_backward(
        self, x: int, dy: int, dx: int, kernel: int, stride: int, pad: int, counted: int, maximum: bool
    ) -> None: ...
    def mean(self, x: int, y: int) -> None: ...
    def mean_backward(self, dy: int, dx: int) -> None: ...
    def mean_to(self, x: int, y: int) -> None: ...
    def mean_to_backward(self, dy: int, dx: int) -> None: ...
    def load(
        self, arrays: list[NDArray[Any]], starts: list[int], counts: list[int], values: int, threads: int
    ) -> None: ...
    def run(self, section: int, tensors: list[NDArray[Any]], threads: int) -> None: ...
    def profile(self) -> list[tuple[str, str, float]]: ...
    def set_profile(self, on: bool) -> None: ...
