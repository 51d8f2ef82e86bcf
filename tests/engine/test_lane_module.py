"""`lipfast.accelerate`: the same results as the model it was given, through everything people do with modules."""

import copy
import io
import os
import resource
import threading
import warnings

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrize, prune

import lipfast
from lipfast.engine import lane_module
from lipfast.engine.capture import Call
from lipfast.engine.lane_module import PLANS_KEPT, LaneModule, SegmentRunner
from lipfast.engine.runtime import Running, pack, unpack
from lipfast.errors import ConfigError, InputError

# Outputs and gradients are relative to their largest entry; float32 against float32, so both sides round.
TOLERANCE = 2e-5


class UNet(nn.Module):
    """Two scales, skip connections, a valid convolution at the end."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = self._pair(3, 6), self._pair(6, 8)
        self.up = nn.Upsample(scale_factor=2, mode="bilinear")
        self.third, self.last = self._pair(14, 6), nn.Conv2d(6, 2, 1)

    @staticmethod
    def _pair(c_in: int, c_out: int) -> nn.Sequential:
        return nn.Sequential(
            nn.Conv2d(c_in, c_out, 3, padding=1),
            nn.BatchNorm2d(c_out),
            nn.ReLU(inplace=True),
            nn.Conv2d(c_out, c_out, 3, padding=1),
            nn.ReLU(),
        )

    def forward(self, x: Tensor) -> Tensor:
        fine = self.first(x)
        coarse = self.second(F.max_pool2d(fine, 2))
        return self.last(self.third(torch.cat([fine, self.up(coarse)], dim=1)))


class ResNet(nn.Module):
    """A stem, two residual blocks (the second halves), a linear head."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 7, 2, 3, bias=False)
        self.norms = nn.ModuleList(nn.BatchNorm2d(8) for _ in range(6))
        self.convs = nn.ModuleList(nn.Conv2d(8, 8, 3, s, 1, bias=False) for s in (1, 1, 2, 1))
        self.short = nn.Conv2d(8, 8, 1, 2, bias=False)
        self.head = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool2d(F.relu(self.norms[0](self.stem(x))), 3, 2, 1)
        y = F.relu(self.norms[1](self.convs[0](x)))
        x = F.relu(x + self.norms[2](self.convs[1](y)))
        y = F.relu(self.norms[3](self.convs[2](x)))
        y = self.norms[4](self.convs[3](y))
        y += self.norms[5](self.short(x))
        return self.head(torch.flatten(F.adaptive_avg_pool2d(F.relu(y), 1), 1))


class Decoder(nn.Module):
    """Down by a stride, a squeeze-and-excitation, and up by transposed convolutions."""

    def __init__(self) -> None:
        super().__init__()
        self.down, self.norm = nn.Conv2d(3, 8, 3, 2, 1), nn.BatchNorm2d(8)
        self.squeeze, self.excite = nn.Conv2d(8, 4, 1), nn.Conv2d(4, 8, 1)
        self.up, self.up_norm = nn.ConvTranspose2d(8, 6, 4, 2, 1, bias=False), nn.BatchNorm2d(6)
        self.same = nn.ConvTranspose2d(9, 2, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        y = F.hardswish(self.norm(self.down(x)))
        factors = F.hardsigmoid(self.excite(F.relu(self.squeeze(F.adaptive_avg_pool2d(y, 1)))))
        y = F.relu6(self.up_norm(self.up(y * factors)))
        return self.same(torch.cat([y, x], dim=1))


def prune_half(model: nn.Module) -> nn.Module:
    for module in model.modules():
        if isinstance(module, (nn.Conv2d, nn.ConvTranspose2d)):
            prune.random_unstructured(module, "weight", 0.6)
    return model


def make(kind: type[nn.Module]) -> nn.Module:
    torch.manual_seed(3)
    return prune_half(kind())


def accelerated(model: nn.Module) -> LaneModule:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # the head of the ResNet runs in torch and says so
        return lipfast.accelerate(model)


def close(a: Tensor, b: Tensor) -> bool:
    return float((a - b).detach().abs().max()) <= TOLERANCE * float(b.detach().abs().max().clamp(min=1e-6))


def call(model: nn.Module, x: Tensor) -> Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        return model(x)


@pytest.mark.parametrize("kind", [UNet, ResNet, Decoder])
@pytest.mark.parametrize("training", [True, False])
def test_whole_nets_forward_and_backward(kind, training):
    model = make(kind).train(training)
    fast = accelerated(model)
    x = torch.randn(2, 3, 32, 48, requires_grad=True)
    x2 = x.detach().clone().requires_grad_()
    expected, got = model(x), call(fast, x2)
    assert close(got, expected)
    expected.square().mean().backward()
    got.square().mean().backward()
    assert close(x2.grad, x.grad)
    dense = dict(model.named_parameters())
    for name, parameter in fast.named_parameters():
        mask = fast.masks.get(name)
        reference = dense[f"{name}_orig"].grad[mask] if mask is not None else dense[name].grad
        scale = max(float(p.grad.abs().max()) for p in dense.values())
        assert float((parameter.grad - reference).abs().max()) <= TOLERANCE * scale, name
    for name, buffer in fast.named_buffers():
        assert torch.allclose(buffer, dict(model.named_buffers())[name], rtol=1e-4, atol=1e-5), name


def zeros_after_remove(model: nn.Module) -> nn.Module:
    for module in model.modules():
        if prune.is_pruned(module) and isinstance(module, nn.Conv2d):
            prune.remove(module, "weight")
    return model


class Masked(nn.Module):
    def __init__(self, mask: Tensor) -> None:
        super().__init__()
        self.register_buffer("mask", mask)

    def forward(self, weight: Tensor) -> Tensor:
        return weight * self.mask


def parametrized() -> nn.Module:
    torch.manual_seed(3)
    model = UNet()
    for module in list(model.modules()):
        if isinstance(module, nn.Conv2d):
            parametrize.register_parametrization(
                module, "weight", Masked((torch.rand_like(module.weight) < 0.4).float())
            )
    return model


@pytest.mark.parametrize(
    "model", [make(UNet), zeros_after_remove(make(UNet)), parametrized()], ids=["hooks", "zeros", "parametrize"]
)
def test_all_ways_of_pruning_are_understood(model):
    model.eval()
    fast = accelerated(model)
    x = torch.randn(1, 3, 16, 24)
    with torch.no_grad():
        assert close(fast(x), model(x))
    kept = sum(parameter.numel() for name, parameter in fast.named_parameters() if name in fast.masks)
    assert len(fast.masks) == 7
    assert 0.3 < kept / sum(mask.numel() for mask in fast.masks.values()) < 0.5


def test_zeros_of_linear_layers_are_pruned_too():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(48, 20), nn.ReLU(), nn.Linear(20, 7))
    prune.global_unstructured([(model[1], "weight"), (model[3], "weight")], prune.L1Unstructured, amount=0.8)
    for layer in (model[1], model[3]):
        prune.remove(layer, "weight")
    fast = accelerated(model)
    assert set(fast.masks) == {"1.weight", "3.weight"}
    for batch in (1, 6):
        x = torch.randn(batch, 3, 4, 4)
        results = [network(x) for network in (model, fast)]
        assert close(results[1], results[0])
        for result in results:
            result.square().sum().backward()
    for name, mask in fast.masks.items():
        expected = model.get_parameter(name).grad[mask]
        assert close(fast.get_parameter(name).grad, expected)
    assert torch.equal(fast.state_dict()["1.weight"], model[1].weight)


class Recurrent(nn.Module):
    """The same layers applied twice."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(4, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.conv(torch.relu(self.norm(self.conv(x)))))


def assert_learns_the_same(fast: LaneModule, model: nn.Module, x: Tensor) -> None:
    """Results, gradients and buffers. Layers whose running statistics change twice run in torch and say so."""
    results = call(model, x), call(fast, x)
    assert close(results[1], results[0])
    weight = torch.randn_like(results[0])
    for result in results:
        (result * weight).sum().backward()
    expected = dict(model.named_parameters(remove_duplicate=False))
    for name, parameter in fast.named_parameters():
        gradient = expected[name].grad
        assert close(parameter.grad, gradient[fast.masks[name]] if name in fast.masks else gradient), name
    for name, buffer in fast.named_buffers():
        assert torch.allclose(buffer, model.get_buffer(name), rtol=1e-5, atol=1e-6), name


@pytest.mark.parametrize("pruned", [False, True])
@pytest.mark.parametrize("training", [False, True])
def test_a_layer_that_is_used_twice_learns_from_both(training, pruned):
    torch.manual_seed(0)
    model = Recurrent().train(training)
    if pruned:
        model.conv.weight.data *= torch.rand_like(model.conv.weight) < 0.4
    assert_learns_the_same(accelerated(model), model, torch.randn(2, 4, 9, 13))


class Transformer(nn.Module):
    """Patches, one block of attention and one of layers on each token, a head on the first token."""

    def __init__(self) -> None:
        super().__init__()
        self.patch, self.position = nn.Conv2d(3, 12, 4, 4), nn.Parameter(torch.randn(1, 15, 12))
        self.norms = nn.ModuleList(nn.LayerNorm(12) for _ in range(2))
        self.qkv, self.proj = nn.Linear(12, 36), nn.Linear(12, 12)
        self.up, self.down, self.head = nn.Linear(12, 48), nn.Linear(48, 12), nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patch(x).flatten(2).transpose(1, 2) + self.position
        batch, tokens, width = x.shape
        q, k, v = self.qkv(self.norms[0](x)).reshape(batch, tokens, 3, 2, width // 2).permute(2, 0, 3, 1, 4).unbind(0)
        x = x + self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(x.shape))
        x = x + self.down(F.gelu(self.up(self.norms[1](x))))
        return self.head(x[:, 0])


class Pixelwise(nn.Module):
    """A depthwise convolution, then linear layers on each pixel, as ConvNeXt has them."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 3, 7, padding=3, groups=3), nn.LayerNorm(3)
        self.up, self.down, self.last = nn.Linear(3, 12), nn.Linear(12, 3), nn.Conv2d(3, 4, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(self.conv(x).permute(0, 2, 3, 1))
        y = self.down(F.gelu(self.up(y)))
        return self.last(x + y.permute(0, 3, 1, 2))


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("kind", [Transformer, Pixelwise])
@pytest.mark.parametrize("batch", [1, 3])
def test_linear_layers_on_tokens_and_pixels(kind, training, batch):
    torch.manual_seed(0)
    model = kind().train(training)
    for module in model.modules():
        if isinstance(module, nn.Linear):
            module.weight.data *= torch.rand_like(module.weight) < 0.2
    fast = accelerated(model)
    assert_learns_the_same(fast, model, torch.randn(batch, 3, 12, 20))
    lanes = {name for name in fast.masks if name.endswith("weight")}
    assert lanes == {f"{name}.weight" for name, module in model.named_modules() if isinstance(module, nn.Linear)}


class MaskedConv(nn.Conv2d):
    """A weight times a mask, as code for lottery tickets writes it."""

    def __init__(self, *sizes: int) -> None:
        super().__init__(*sizes, padding=1)
        self.register_buffer("mask", (torch.rand_like(self.weight) < 0.3).float())

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.weight * self.mask, self.bias, padding=1)


class StandardisedConv(nn.Conv2d):
    """Weight standardisation."""

    def __init__(self, *sizes: int) -> None:
        super().__init__(*sizes, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight - self.weight.mean((1, 2, 3), keepdim=True)
        return F.conv2d(x, weight / (weight.std((1, 2, 3), keepdim=True) + 1e-5), self.bias, padding=1)


class NormedConv(nn.Conv2d):
    """Weight standardisation by torch's BatchNorm, with a gain, which is a view of a parameter or computed."""

    def __init__(self, *sizes: int) -> None:
        super().__init__(*sizes, padding=1)
        self.gain = nn.Parameter(torch.rand(self.out_channels, 1, 1, 1) + 0.5)

    def forward(self, x: Tensor) -> Tensor:
        gain = (self.gain * 0.5).view(-1) if self.in_channels == 3 else self.gain.view(-1)
        flat = self.weight.reshape(1, self.out_channels, -1)
        weight = F.batch_norm(flat, None, None, weight=gain, training=True, momentum=0.0, eps=1e-5)
        return F.conv2d(x, weight.reshape_as(self.weight), self.bias, padding=1)


class NormedByRow(nn.Conv2d):
    """Each row of a weight has a given length."""

    def __init__(self, *sizes: int) -> None:
        super().__init__(*sizes, padding=1)
        self.length = nn.Parameter(torch.rand(self.out_channels, 1, 1, 1) + 0.5)

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, torch._weight_norm(self.weight, self.length, 0), self.bias, padding=1)


COMPUTED = [MaskedConv, StandardisedConv, NormedConv, NormedByRow]


@pytest.mark.parametrize("kind", COMPUTED)
def test_weights_that_forward_computes_cut_no_segment_in_two(kind):
    torch.manual_seed(0)
    model = nn.Sequential(kind(3, 6, 3), nn.ReLU(), kind(6, 6, 3), nn.Sigmoid(), kind(6, 2, 3))
    fast = lipfast.accelerate(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # no map is converted, so there is nothing to say
        assert_learns_the_same(fast, model, torch.randn(2, 3, 12, 20))
    (compiled,) = fast._compiled.values()
    assert sum(isinstance(item, SegmentRunner) for item in compiled._items) == 1
    with torch.no_grad():
        for parameter in (*fast.parameters(), *model.parameters()):
            parameter.mul_(1.5)
    x = torch.randn(2, 3, 12, 20)
    assert close(fast(x), model(x))


@pytest.mark.parametrize("pruned", [False, True])
@pytest.mark.parametrize("kind", COMPUTED[1:])
def test_computed_weights_are_computed_once_while_nothing_is_written(kind, pruned, monkeypatch):
    """Without gradients; and they are watched, so that programs prepare them once."""
    torch.manual_seed(0)
    model = nn.Sequential(kind(3, 6, 3), nn.ReLU(), kind(6, 2, 3))
    if pruned:
        for layer in (model[0], model[2]):
            layer.weight.data *= torch.rand_like(layer.weight) < 0.5
    fast, x = lipfast.accelerate(model), torch.randn(2, 3, 12, 20)
    with torch.inference_mode(), monkeypatch.context() as watched:
        for _ in range(3):
            assert close(fast(x), model(x))
        run, loads = [], []
        watched.setattr(lane_module, "run_call", lambda *_: run.append(1))
        watched.setattr(SegmentRunner, "load", lambda *_: loads.append(1))
        assert close(fast(x), model(x))
        assert run == loads == []
    for change in (lambda p: p.data.mul_(1.5), lambda p: p.requires_grad_(False).abs_().requires_grad_(), set_data):
        for module in (fast, model):
            change(module.get_parameter("2.weight"))
            change([*module.parameters()][-1])  # a bias, a gain or a length
        for _ in range(2):
            with torch.no_grad():
                assert close(fast(x), model(x))
        assert_learns_the_same(fast, model, x)
        for module in (fast, model):
            module.zero_grad()


class HandsOutItsWeight(nn.Module):
    """Returns a weight that it computes, and a view of another one."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.table = nn.Conv2d(3, 6, 3), nn.Parameter(torch.randn(5, 6))

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        weight = self.conv.weight * 2
        shift = self.table.exp()[1].view(6, 1, 1)
        return F.conv2d(x, weight, self.conv.bias) + shift + self.table[2].view(6, 1, 1), weight.flatten(1), shift


def test_computed_weights_that_a_caller_gets_are_the_callers():
    torch.manual_seed(0)
    model = HandsOutItsWeight()
    fast, x = lipfast.accelerate(model), torch.randn(2, 3, 12, 20)
    with torch.no_grad():
        for _ in range(4):
            results, expected = fast(x), model(x)
            assert all(close(one, other) for one, other in zip(results, expected, strict=True))
            for result in results:
                result.mul_(7)


def test_a_mask_that_forward_multiplies_by_is_pruning():
    """Until it changes; weights that change without gradients are seen."""
    torch.manual_seed(0)
    model = nn.Sequential(MaskedConv(3, 6, 3), nn.ReLU(), MaskedConv(6, 2, 3))
    fast, x = lipfast.accelerate(model), torch.randn(2, 3, 12, 20)
    for change in (None, "weight", "mask"):
        if change is not None:
            number = torch.rand(6, 3, 3, 3) < 0.6
            for module in (fast, model):
                dict(module.state_dict(keep_vars=True))[f"0.{change}"].data.copy_(number)
        assert_learns_the_same(fast, model, x)
        for module in (fast, model):
            module.zero_grad()
        with torch.no_grad():
            for _ in range(3):
                assert close(fast(x), model(x))
        kept = [running.plan.values[0] for running in programs_of(fast)]
        assert all(part.stop - part.start == int(model[0].mask.sum()) for part in kept[-2:])


@pytest.mark.parametrize("live", [False, True])
def test_a_mask_beside_zeros(live):
    """Weights that are zero where the mask drops them, and somewhere else; then the mask drops some that live."""
    torch.manual_seed(0)
    model = nn.Sequential(MaskedConv(3, 6, 3), nn.ReLU(), MaskedConv(6, 2, 3))
    for layer in (model[0], model[2]):
        layer.weight.data *= layer.mask * (torch.rand_like(layer.mask) < 0.8)
    fast, x = lipfast.accelerate(model), torch.randn(2, 3, 12, 20)
    assert set(fast.masks) == {"0.weight", "2.weight"}
    if live:
        for buffer in (model[0].mask, fast.get_buffer("0.mask")):
            buffer[:3] = 0
    assert_learns_the_same(fast, model, x)
    with torch.no_grad():
        assert close(fast(x), model(x))
    items = [item for compiled in fast._compiled.values() for item in compiled._items]
    assert any(isinstance(item, Call) for item in items) == live


def test_packing_hands_no_memory_out():
    """After `Tensor.numpy` torch cannot tell who writes a tensor, and a watch has to read it in every call."""
    dense, mask = torch.randn(5, 7).t(), torch.rand(7, 5) < 0.5
    values = pack(dense, mask)
    assert torch.equal(values, dense[mask])
    assert torch.equal(unpack(values, mask.shape, mask), dense * mask)
    assert dense.untyped_storage().resizable()
    assert values.untyped_storage().resizable()


def programs_of(fast: LaneModule) -> list[Running]:
    runners = [item for compiled in fast._compiled.values() for item in compiled._items]
    return [running for runner in runners for free in runner._free.values() for running in free]


class TwiceMasked(MaskedConv):
    """A masked weight that a layer in lanes and one in torch read."""

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight * self.mask
        return F.conv2d(F.conv2d(x, weight, self.bias, padding=1), weight, stride=3)


def test_a_masked_weight_that_torch_reads_too():
    torch.manual_seed(0)
    model = TwiceMasked(6, 6, 3)
    fast, x = accelerated(model), torch.randn(2, 6, 12, 20)
    assert_learns_the_same(fast, model, x)
    with torch.no_grad():
        assert close(call(fast, x), model(x))


class ReadsMovedStatistics(nn.Module):
    """Computes on running statistics once they moved."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.last = nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.Conv2d(6, 2, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(self.conv(x))
        scale = (self.norm.running_var + 1e-3).sqrt().view(6, 1, 1)
        return self.last(y * scale)


def test_what_is_computed_from_moved_statistics_waits_for_them():
    torch.manual_seed(0)
    model = ReadsMovedStatistics()
    fast = accelerated(model)
    x = torch.randn(2, 3, 9, 13)
    for _ in range(2):
        assert close(call(fast, x), model(x))


def test_tokens_may_lie_in_any_order_and_results_may_be_written():
    torch.manual_seed(0)
    model = prune.random_unstructured(nn.Linear(6, 8), "weight", 0.8)
    fast = lipfast.accelerate(model)
    x = torch.randn(6, 7, 5).permute(2, 1, 0)
    expected, got = model(x), fast(x)
    assert got.is_contiguous()
    got.add_(1).mul_(2)
    assert close(got, 2 * (expected + 1))
    weight = torch.randn(8, 7, 5).permute(2, 1, 0)
    got.backward(weight)
    expected.backward(2 * weight)
    assert close(fast.get_parameter("weight").grad, model.weight_orig.grad[fast.masks["weight"]])


def test_a_module_in_two_places_is_left_as_it_was():
    torch.manual_seed(0)
    conv = nn.Conv2d(4, 4, 3, padding=1)
    model = nn.Sequential(conv, nn.ReLU(), conv)
    fast = lipfast.accelerate(model)
    for _ in range(2):
        model.zero_grad()
        fast.zero_grad()
        assert_learns_the_same(fast, model, torch.randn(2, 4, 9, 13))
    assert torch.equal(fast.to_dense()[0].weight, conv.weight)


def test_a_pruned_weight_that_modules_share_stays_shared():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 4, 3, padding=1))
    model[2].weight = model[0].weight
    model[0].weight.data *= torch.rand_like(model[0].weight) < 0.4
    for masks in (None, {"2.weight": model[0].weight != 0}):
        fast = lipfast.accelerate(model, masks)
        assert list(fast.masks) == ["0.weight"]
        model.zero_grad()
        assert_learns_the_same(fast, model, torch.randn(2, 4, 9, 13))
    state = fast.state_dict()
    assert all(torch.equal(state[name], tensor) for name, tensor in model.state_dict().items())
    fast.load_state_dict({name: 2 * tensor for name, tensor in state.items()})
    assert torch.equal(fast.state_dict()["2.weight"], 2 * state["0.weight"])
    dense = fast.to_dense()
    assert dense[2].weight is dense[0].weight


def test_a_dict_of_masks():
    torch.manual_seed(0)
    model = UNet().eval()
    masks = {"first.0.weight": torch.rand(6, 3, 3, 3) < 0.2}
    fast = lipfast.accelerate(model, masks)
    assert fast.get_parameter("first.0.weight").shape == (int(masks["first.0.weight"].sum()),)
    with torch.no_grad():
        model.first[0].weight.mul_(masks["first.0.weight"])
        x = torch.randn(1, 3, 16, 16)
        assert close(fast(x), model(x))


def test_state_dicts_go_both_ways():
    model = zeros_after_remove(make(UNet))
    fast = accelerated(model)
    state = fast.state_dict()
    assert list(state) == list(model.state_dict())
    assert all(torch.equal(state[name], tensor) for name, tensor in model.state_dict().items())
    changed = {name: tensor * 2 for name, tensor in state.items()}
    fast.load_state_dict(changed)
    model.load_state_dict(fast.state_dict())
    x = torch.randn(1, 3, 16, 16)
    assert close(fast.eval()(x), model.eval()(x))
    assert close(fast.to_dense()(x), model(x))
    assert not isinstance(fast.to_dense(), LaneModule)


def test_a_checkpoint_with_other_zeros_is_refused():
    fast = accelerated(make(UNet))
    state = {name: torch.ones_like(tensor) for name, tensor in fast.state_dict().items()}
    with pytest.raises(InputError, match=r"first\.0\.weight has weights where this module is pruned"):
        fast.load_state_dict(state)


@pytest.mark.parametrize(
    "copied",
    [copy.deepcopy, lambda m: torch.load(io.BytesIO(saved(m)), weights_only=False)],
    ids=["deepcopy", "pickle"],
)
def test_copies_are_independent(copied):
    fast = accelerated(make(UNet)).eval()
    x = torch.randn(1, 3, 16, 16)
    before = fast(x).detach()
    other = copied(fast)
    assert torch.equal(other(x), before)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(2.0)
    assert torch.equal(fast(x), before)
    assert not torch.equal(other(x), before)


def saved(module: nn.Module) -> bytes:
    buffer = io.BytesIO()
    torch.save(module, buffer)
    return buffer.getvalue()


def lbfgs(parameters):
    return torch.optim.LBFGS(parameters, lr=0.1, max_iter=3)


@pytest.mark.parametrize(
    "optimiser",
    [
        lambda p: torch.optim.SGD(p, lr=0.01, momentum=0.9, weight_decay=1e-3),
        lambda p: torch.optim.AdamW(p, lr=1e-3),
        lbfgs,
    ],
    ids=["sgd", "adamw", "lbfgs"],
)
def test_optimisers_train_as_on_the_pruned_model(optimiser):
    """No BatchNorm: behind it a bias has a gradient of pure rounding noise, which Adam would blow up."""
    torch.manual_seed(0)
    model = prune_half(nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.SiLU(), nn.Conv2d(8, 3, 3, padding=1)))
    fast = accelerated(model)
    x, target = torch.randn(2, 3, 16, 16), torch.randn(2, 3, 16, 16)
    for module in (model, fast):
        stepper = optimiser(module.parameters())

        def closure(module=module, stepper=stepper):
            stepper.zero_grad()
            loss = F.mse_loss(module(x), target)
            loss.backward()
            return loss

        for _ in range(4):
            stepper.step(closure)
    with torch.no_grad():
        assert float((fast(x) - model(x)).abs().max()) < 1e-4


def test_gradients_accumulate_over_passes_in_any_order():
    model = make(UNet).eval()
    fast = accelerated(model)
    first, second = torch.randn(1, 3, 16, 16), torch.randn(1, 3, 16, 16)
    outputs = [fast(first), fast(second)]  # both passes await their backward pass
    outputs[0].sum().backward()
    outputs[1].sum().backward()
    (model(first).sum() + model(second).sum()).backward()
    assert close(fast.last.weight.grad, model.last.weight_orig.grad[fast.masks["last.weight"]])


def test_backward_twice_gives_the_same_gradients():
    fast = accelerated(make(UNet))
    x = torch.randn(1, 3, 16, 16, requires_grad=True)
    y = fast(x).square().sum()
    (first,) = torch.autograd.grad(y, x, retain_graph=True)
    (second,) = torch.autograd.grad(y, x)
    assert torch.equal(first, second)


def test_double_backward_is_refused():
    fast = accelerated(make(UNet))
    x = torch.randn(1, 3, 16, 16, requires_grad=True)
    (gradient,) = torch.autograd.grad(fast(x).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="double backward"):
        gradient.sum().backward()


def test_pruned_layers_in_torch_have_derivatives_of_any_order():
    torch.manual_seed(0)
    model = prune.random_unstructured(nn.Linear(6, 8), "weight", 0.3)
    fast = lipfast.accelerate(model)
    weights = model.weight_orig, fast.get_parameter("weight")
    x = torch.randn(5, 6)
    for module, weight in zip((model, fast), weights, strict=True):
        (first,) = torch.autograd.grad(call(module, x).pow(3).sum(), weight, create_graph=True)
        first.square().sum().backward()
    assert close(weights[1].grad, weights[0].grad[fast.masks["weight"]])


def test_changing_sizes_and_modes():
    model = make(UNet)
    fast = accelerated(model)
    for size in ((16, 16), (20, 28), (16, 16)):
        x = torch.randn(1, 3, *size)
        for training in (True, False):
            assert close(fast.train(training)(x), model.train(training)(x))


def test_threads_may_call_one_module():
    fast = accelerated(make(UNet)).eval()
    inputs = [torch.randn(1, 3, 16, 16) for _ in range(4)]
    with torch.no_grad():
        expected = [fast(x) for x in inputs]
        got: dict[int, Tensor] = {}

        def work(k: int) -> None:
            with torch.no_grad():
                for _ in range(5):
                    got[k] = fast(inputs[k])

        workers = [threading.Thread(target=work, args=(k,)) for k in range(4)]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
    assert all(torch.equal(got[k], expected[k]) for k in range(4))


@pytest.fixture
def three_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    yield
    torch.set_num_threads(before)


def use_the_threads_of_torch() -> None:
    torch.ones(1 << 20).exp()


def threads_of_this_process() -> int:
    return len(os.listdir("/proc/self/task"))


@pytest.mark.parametrize("backward", [False, True])
def test_the_threads_of_torch_end_where_ours_begin(three_threads, backward):
    fast, x = accelerated(make(UNet)), torch.randn(1, 3, 16, 16)
    y = fast(x).sum()
    use_the_threads_of_torch()
    before = threads_of_this_process()
    y.backward() if backward else fast(x)
    assert threads_of_this_process() == before - 2
    use_the_threads_of_torch()
    assert threads_of_this_process() == before


@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")
def test_a_child_forked_beside_the_threads_of_torch_computes_the_same(three_threads, exit_code_of_a_child):
    fast, x = accelerated(make(UNet)).eval(), torch.randn(1, 3, 16, 16)
    with torch.no_grad():
        expected = fast(x).numpy()
        use_the_threads_of_torch()

        def same() -> bool:  # numpy compares: torch's own threads stayed with the parent
            return np.array_equal(fast(x).numpy(), expected)

        assert exit_code_of_a_child(same) == 0


def test_frozen_parameters_get_no_gradient():
    fast = accelerated(make(UNet))
    fast.last.weight.requires_grad_(False)
    fast(torch.randn(1, 3, 16, 16)).sum().backward()
    assert fast.last.weight.grad is None
    assert fast.last.bias.grad is not None


def test_nan_in_weights_comes_out():
    model = zeros_after_remove(make(UNet)).eval()
    with torch.no_grad():
        model.first[0].weight[0, 0, 0, 0] = float("nan")
    assert bool(accelerated(model)(torch.randn(1, 3, 16, 16)).isnan().any())


def test_unknown_operators_run_in_torch_and_are_named_once():
    torch.manual_seed(0)
    model = prune_half(
        nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.Softplus(), nn.Conv2d(4, 3, 3, padding=1))
    ).eval()
    fast = lipfast.accelerate(model)
    x = torch.randn(1, 3, 16, 16)
    with pytest.warns(UserWarning, match="softplus: the engine has no such operator"):
        y = fast(x)
    assert close(y, model(x))
    assert close(fast(x[:, :, :8]), model(x[:, :, :8]))  # a second warning would be an error


def test_hooks_inside_are_refused_and_outside_run():
    model = UNet()
    fast = lipfast.accelerate(model)
    seen = []
    fast.register_forward_hook(lambda module, args, output: seen.append(output.shape))
    fast(torch.randn(1, 3, 16, 16))
    assert seen == [(1, 2, 16, 16)]
    model.first[0].register_forward_hook(lambda module, args, output: None)
    with pytest.raises(InputError, match=r"'first\.0' has hooks"):
        lipfast.accelerate(model)


def test_code_that_depends_on_values_is_refused():
    class Peeks(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x * 2 if float(x.sum()) > 0 else x

    with pytest.raises(InputError, match="cannot be recorded"):
        lipfast.accelerate(Peeks())(torch.randn(1, 3, 8, 8))


def test_other_dtypes_run_in_torch():
    model = UNet().double().eval()
    with pytest.warns(UserWarning, match="float32"):
        y = lipfast.accelerate(model)(torch.randn(1, 3, 16, 16, dtype=torch.float64))
    assert y.dtype == torch.float64


def test_writing_into_a_tensor_that_is_not_returned_is_refused():
    class Doubled(torch.autograd.Function):
        @staticmethod
        def forward(ctx: object, x: Tensor, y: Tensor) -> Tensor:
            y.add_(1)
            return x * 2

    class Writes(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            y = x * 2
            Doubled.apply(x, y)
            return y

    with pytest.raises(InputError, match=r"writes into a tensor that Doubled\.apply does not return"):
        lipfast.accelerate(Writes())(torch.randn(1, 3, 8, 8))


def test_without_gradients_nothing_is_planned_for_a_backward_pass():
    model, x = make(UNet), torch.randn(1, 3, 16, 16)
    fast = lipfast.accelerate(model.eval())
    with torch.no_grad():
        fast(x)
    (compiled,) = fast._compiled.values()
    (runner,) = [item for item in compiled._items if isinstance(item, SegmentRunner)]
    ((running,),) = runner._free.values()
    assert {section for section, _, _ in running.profile()} == {"forward"}


def set_data(p: nn.Parameter) -> None:
    p.data = p.data * 2


@pytest.mark.parametrize(
    "change",
    [
        lambda p: p.data.mul_(2.0),
        set_data,
        lambda p: p.detach().numpy().__imul__(2.0),
        lambda p: p.copy_(2 * p),
    ],
    ids=["write through .data", "other .data", "write through numpy", "copy"],
)
def test_weights_changed_by_any_way_are_used(change):
    fast = accelerated(make(ResNet)).eval()
    x = torch.randn(1, 3, 32, 32)
    with torch.no_grad():
        for _ in range(2):
            before = fast(x)
        for module in (fast, fast.to(memory_format=torch.channels_last)):
            for parameter in module.parameters():
                change(parameter)
            for buffer in module.buffers():
                if buffer.is_floating_point():
                    buffer.data.add_(0.25)
            assert close(module(x), module.to_dense()(x))
            assert not close(module(x), before)


def test_running_statistics_set_back_are_used_again():
    """Passes in training mode without gradients change the statistics where the program keeps them, too."""
    model = make(ResNet).train()
    fast, x = accelerated(model), torch.randn(2, 3, 32, 32)
    plain = fast.to_dense().train()
    first = {name: buffer.clone() for name, buffer in fast.named_buffers()}
    with torch.no_grad():
        plain(x)
        for _ in range(2):
            for name, buffer in fast.named_buffers():
                buffer.copy_(first[name])
            fast(x)
    for name, buffer in plain.named_buffers():
        torch.testing.assert_close(fast.state_dict()[name], buffer, rtol=1e-4, atol=1e-5)


def test_threads_may_train_models_of_their_own():
    def train(model: nn.Module, x: Tensor) -> Tensor:
        stepper = torch.optim.SGD(model.parameters(), lr=0.01)
        schedule = torch.optim.lr_scheduler.StepLR(stepper, 2)
        for _ in range(4):
            stepper.zero_grad()
            model(x).square().mean().backward()
            stepper.step()
            schedule.step()
        return model(x).detach()

    fast = [accelerated(make(kind)).eval() for kind in (UNet, ResNet, UNet)]
    inputs = [torch.randn(1, 3, 16 + 8 * k, 16) for k in range(3)]
    expected = [train(copy.deepcopy(model), x) for model, x in zip(fast, inputs, strict=True)]
    got: dict[int, Tensor] = {}
    workers = [threading.Thread(target=lambda k=k: got.update({k: train(fast[k], inputs[k])})) for k in range(3)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert all(torch.equal(got[k], expected[k]) for k in range(3))


def test_programs_of_many_sizes_are_not_kept():
    fast = accelerated(make(UNet)).eval()
    with torch.no_grad():
        for step in range(PLANS_KEPT):
            fast(torch.randn(1, 3, 16, 16 + 2 * step))
        with pytest.warns(UserWarning, match="more than 8 input sizes"):
            fast(torch.randn(1, 3, 18, 16))
        fast(torch.randn(1, 3, 20, 16))
    assert len(fast._compiled) == PLANS_KEPT


def test_too_large_an_input_says_so(request):
    fast = lipfast.accelerate(nn.Conv2d(1, 4096, 3, padding=1).eval())
    limits = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (1 << 37, limits[1]))  # whatever the machine has: 137 GB, half of the maps
    request.addfinalizer(lambda: resource.setrlimit(resource.RLIMIT_AS, limits))
    with torch.no_grad(), pytest.raises(MemoryError, match=r"no 2\d+.\d GB for the maps"):
        fast(torch.empty(1, 1, 1, 1).expand(4, 1, 2048, 2048))


@pytest.mark.parametrize("training", [True, False])
def test_inference_mode(training):
    model, x = make(ResNet).train(training), torch.randn(2, 3, 32, 32)
    fast = accelerated(model)
    with torch.inference_mode():
        inside = torch.randn(2, 3, 32, 32)
        for tensor in (x, inside):
            assert close(fast(tensor), model(tensor))
    assert close(fast(x), model(x))


def test_torch_calls_keep_no_tensor_that_nothing_reads_again(monkeypatch):
    known, run = [], lane_module.run_call

    def counted(call: Call, tensors: dict[int, Tensor], device: torch.device) -> None:
        known.append(len(tensors))
        run(call, tensors, device)

    monkeypatch.setattr(lane_module, "run_call", counted)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), *(nn.Softplus() for _ in range(8))).eval()
    with torch.no_grad():
        call(lipfast.accelerate(model), torch.randn(1, 3, 8, 8))
    assert known == [1] * 8


def test_windows_for_each_channel_alone_stay_in_torch():
    """They save less than converting their maps costs."""
    depthwise = nn.Conv2d(6, 12, 3, padding=1, groups=6)
    model = nn.Sequential(depthwise, nn.Softplus(), nn.Conv2d(12, 4, 1, groups=2)).eval()
    fast, x = lipfast.accelerate(model), torch.randn(1, 6, 8, 8)
    with torch.no_grad():
        assert close(call(fast, x), model(x))
    (compiled,) = fast._compiled.values()
    assert [isinstance(item, Call) for item in compiled._items] == [True, True, False]


def test_the_kernel_can_be_asked_for(monkeypatch):
    fast = lipfast.accelerate(nn.Conv2d(8, 8, 3, padding=1)).eval()
    exact = lipfast.accelerate(nn.Conv2d(8, 8, 3, padding=1), exact=True).eval()
    exact.load_state_dict(fast.state_dict())
    x = torch.randn(1, 8, 40, 40)
    results = {}
    with torch.no_grad():
        for kernel in "winograd", "dense":
            monkeypatch.setenv("LIPFAST_KERNEL", kernel)
            results[kernel] = copy.deepcopy(fast)(x)  # a program keeps its kernels
        monkeypatch.delenv("LIPFAST_KERNEL")
        assert torch.equal(results["dense"], exact(x))
        assert not torch.equal(results["winograd"], results["dense"])
        monkeypatch.setenv("LIPFAST_KERNEL", "bogus")
        with pytest.raises(ConfigError, match="kernel 'bogus' is unknown"):
            copy.deepcopy(fast)(x)
