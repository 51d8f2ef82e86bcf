"""``torch.compile`` with the lipfast backend: the same results, whatever the graph holds."""

import copy
import ctypes
import warnings
from importlib import import_module
from pathlib import Path

import pytest
import tomllib
import torch
from torch import Tensor, nn
from torch.nn.utils import prune

import lipfast._C as _C
from lipfast.engine import dynamo, lane_module
from lipfast.engine.builder import Segment
from lipfast.engine.capture import Call
from lipfast.engine.lane_module import Compiled
from lipfast.engine.lower import Lowered

TOLERANCE = 2e-5


def small(activation: nn.Module | None = None) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 6, 3, padding=1, padding_mode="reflect"),
        nn.BatchNorm2d(6),
        activation or nn.ReLU(inplace=True),
        nn.Conv2d(6, 4, 3, 2, 1),
    )


def growing() -> nn.Sequential:
    torch.manual_seed(0)
    layers = nn.Conv2d(3, 6, 3, 2, 1), nn.BatchNorm2d(6), nn.Hardswish()
    return nn.Sequential(*layers, nn.ConvTranspose2d(6, 16, 4, 2, 1), nn.ReLU6(), nn.PixelShuffle(2))


def features() -> nn.Sequential:
    """No map at all."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Flatten(), nn.Linear(3 * 16 * 20, 12), nn.BatchNorm1d(12), nn.LeakyReLU(0.2), nn.Linear(12, 5)
    )


def pruned(model: nn.Module) -> nn.Module:
    for module in model.modules():
        if isinstance(module, (nn.Conv2d, nn.ConvTranspose2d, nn.Linear)):
            prune.random_unstructured(module, "weight", 0.7)
    return model


def compiled(model: nn.Module, options: dict[str, str] | None = None) -> nn.Module:
    torch._dynamo.reset()
    return torch.compile(model, backend=dynamo.lipfast, options=options)


def close(a: Tensor, b: Tensor) -> bool:
    return float((a - b).detach().abs().max()) <= TOLERANCE * float(b.detach().abs().max())


def test_torch_finds_the_backend_by_its_entry_point():
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())
    module, name = project["project"]["entry-points"]["torch_dynamo_backends"]["lipfast"].split(":")
    assert getattr(import_module(module), name) is dynamo.lipfast


def recurrent() -> nn.Sequential:
    """The same layer twice."""
    torch.manual_seed(0)
    conv = nn.Conv2d(3, 3, 3, padding=1)
    return nn.Sequential(conv, nn.SiLU(), conv)


@pytest.mark.parametrize("build", [small, growing, features, recurrent])
@pytest.mark.parametrize("prepare", [lambda m: m, pruned], ids=["dense", "pruned"])
def test_training(prepare, build):
    model, twin = prepare(build()), prepare(build())
    with torch.no_grad():  # pruning drew other masks for the twin
        for buffer, other in zip(twin.buffers(), model.buffers(), strict=True):
            buffer.copy_(other)
    x = torch.randn(2, 3, 16, 20)
    optimisers = [torch.optim.SGD(m.parameters(), lr=0.1) for m in (model, twin)]
    fast = compiled(model)
    for _ in range(3):
        results = [fast(x), twin(x)]
        assert close(*results)
        for result, optimiser in zip(results, optimisers, strict=True):
            optimiser.zero_grad()
            result.square().mean().backward()
            optimiser.step()
    for (name, parameter), other in zip(model.named_parameters(), twin.parameters(), strict=True):
        assert torch.allclose(parameter.grad, other.grad, rtol=1e-3, atol=1e-5), name
    for buffer, other in zip(model.buffers(), twin.buffers(), strict=True):
        assert torch.allclose(buffer.float(), other.float(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("build", [small, growing, features])
def test_kernels_read_the_masked_parameters_and_not_their_products(monkeypatch, build):
    read: list[set[str | None]] = []

    def spied(lowered: Lowered, masks: dict[str, Tensor], **options: bool) -> Compiled:
        (segment,) = [item for item in lowered.items if isinstance(item, Segment)]  # products cut it nowhere
        read.append(set(masks) - {lowered.recording.leaves.get(ref.number) for ref in segment.weights})
        assert len(masks) == 2
        return Compiled(lowered, masks, **options)

    monkeypatch.setattr(dynamo, "Compiled", spied)
    compiled(pruned(build()))(torch.randn(2, 3, 16, 20))
    assert read == [set()]


def test_inference_uses_zeros_and_sees_them_go():
    model = pruned(small()).eval()
    for module in (model[0], model[3]):
        prune.remove(module, "weight")
    fast = compiled(model)
    x = torch.randn(1, 3, 16, 16)
    with torch.no_grad():
        assert close(fast(x), model(x))
        model[0].weight.data[0] += 1.0  # revives weights behind everybody's back
        assert close(fast(x), model(x))
        model[3].weight.data.mul_(0.5)
        assert close(fast(x), model(x))


def test_inference_of_layers_of_features_uses_zeros():
    model = pruned(features()).eval()
    for module in (model[1], model[4]):
        prune.remove(module, "weight")
    x = torch.randn(6, 3, 16, 20)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.filterwarnings("error", "lipfast")  # nothing is left to torch
        fast = compiled(model)
        assert close(fast(x), model(x))
        model[1].weight.data[0] += 1.0
        assert close(fast(x), model(x))


def load_other_numbers(model: nn.Module) -> None:
    model.load_state_dict({name: tensor * 1.5 for name, tensor in model.state_dict().items()})


def step_an_optimiser(model: nn.Module) -> None:
    model[3].weight.grad = torch.ones_like(model[3].weight)
    torch.optim.SGD(model.parameters(), lr=0.1).step()


def write_in_place(model: nn.Module) -> None:
    with torch.no_grad():
        model[0].weight[0] += 1.0


def put_another_tensor(model: nn.Module) -> None:
    model[3].weight.data = model[3].weight.data * 2  # other memory


def write_behind_everybodys_back(model: nn.Module) -> None:
    model[0].weight.data[0, 0, 0, 0] += 1.0


@pytest.mark.parametrize("options", [None, {"changes": "contents"}], ids=["writes", "contents"])
@pytest.mark.parametrize(
    "change",
    [load_other_numbers, step_an_optimiser, write_in_place, put_another_tensor, write_behind_everybodys_back],
)
def test_changed_weights_are_seen(change, options):
    model = pruned(small()).eval()
    for module in (model[0], model[3]):
        prune.remove(module, "weight")
    fast = compiled(model, options)
    x = torch.randn(1, 3, 16, 16)
    with torch.no_grad():
        for _ in range(4):  # until nothing is read any more
            before = fast(x)
            assert close(before, model(x))
    change(model)
    with torch.no_grad():
        for _ in range(4):
            after = fast(x)
            assert close(after, model(x))
            assert not torch.equal(after, before)
    change(model)
    with torch.no_grad():
        assert close(fast(x), model(x))


class Centred(nn.Module):
    """Its last weight is computed, from a parameter alone."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.weight = small(), nn.Parameter(torch.randn(4, 5, 3, 3))

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        return nn.functional.conv2d(x, self.weight[:, : x.shape[1]] - self.weight.mean((1, 2, 3), keepdim=True))


@pytest.mark.filterwarnings("ignore:lipfast:UserWarning")
@pytest.mark.parametrize("build", [small, Centred])
def test_contents_sees_writes_through_pointers_to_dense_weights(build):
    model = build().eval()
    pointers = [parameter.data_ptr() for parameter in model.parameters()]
    fast, x = compiled(model, {"changes": "contents"}), torch.randn(1, 3, 16, 16)
    with torch.no_grad():
        for _ in range(4):
            assert close(fast(x), model(x))
        for pointer in pointers:
            ctypes.c_float.from_address(pointer).value += 1.0
        assert close(fast(x), model(x))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"changes": "never"}, "option 'changes' is 'never'; use one of writes, contents"),
        ({"chagnes": "writes"}, "lipfast has no option 'chagnes'"),
    ],
)
def test_unknown_options_are_refused(options, message):
    with pytest.raises(torch._dynamo.exc.BackendCompilerFailed, match=message):
        compiled(small(), options)(torch.randn(1, 3, 16, 16))


def test_a_changed_mask_is_seen():
    model = pruned(small())
    fast = compiled(model)
    x = torch.randn(1, 3, 16, 16)
    fast(x)
    model[0].weight_mask.copy_(torch.ones_like(model[0].weight_mask))
    twin = copy.deepcopy(small())
    assert close(fast(x), nn.Sequential(*model)(x))
    assert close(twin[0](x), model[0](x))  # the mask is off: the seeded initial weights are back


def test_graph_breaks_and_unknown_operators():
    class Broken(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = small(nn.Softplus()), nn.Conv2d(4, 2, 1)

        def forward(self, x: Tensor) -> Tensor:
            x = self.first(x)
            torch._dynamo.graph_break()
            return self.second(x) * float(x.detach().mean() > -1e9)

    torch.manual_seed(0)
    model = Broken().eval()
    fast = compiled(model)
    x = torch.randn(1, 3, 16, 16, requires_grad=True)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        result = fast(x)
    assert any("softplus: the engine has no such operator" in str(warning.message) for warning in said)
    assert close(result, model(x))
    (fast_gradient,) = torch.autograd.grad(result.sum(), x)
    (gradient,) = torch.autograd.grad(model(x).sum(), x)
    assert close(fast_gradient, gradient)


def test_sizes_may_change():
    model = small().eval()
    fast = compiled(model)
    for size in ((16, 16), (12, 20), (24, 8)):
        x = torch.randn(2, 3, *size)
        assert close(fast(x), model(x))


class Placed(nn.Module):
    """Adds a shift for each place, looked up in a table."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.table = small(), nn.Parameter(torch.randn(9, 4))
        self.register_buffer("places", torch.arange(80) % 9)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.body(x) + self.table[self.places].T.reshape(1, 4, 8, 10))


def test_what_is_made_of_parameters_and_buffers_is_made_once(monkeypatch):
    """Until one of them is written."""
    model = Placed().eval()
    fast, x = compiled(model), torch.randn(1, 3, 16, 20)
    looked_up = []
    run_call = lane_module.run_call

    def counted(call: Call, *others: object) -> None:
        looked_up.append(call)
        run_call(call, *others)

    monkeypatch.setattr(lane_module, "run_call", counted)
    changes = (
        lambda: None,
        lambda: model.table.data.mul_(2),
        lambda: model.places.copy_(model.places.flip(0)),
        lambda: setattr(model, "places", model.places.flip(0) // 2),
    )
    with torch.no_grad():
        for change in changes:
            change()
            looked_up.clear()
            assert close(fast(x), model(x))
            assert looked_up
            looked_up.clear()
            assert close(fast(x), model(x))
            assert not looked_up


def test_writing_into_the_callers_tensor_is_left_to_torch():
    def write(x: Tensor) -> Tensor:
        return nn.functional.conv2d(x.relu_(), torch.ones(2, 3, 1, 1))

    torch._dynamo.reset()
    fast = torch.compile(write, backend=dynamo.lipfast)
    x = torch.randn(1, 3, 8, 8)
    other = x.clone()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        result = fast(x)
    assert close(result, write(other))
    assert torch.equal(x, other)


def test_the_fingerprint_sees_every_change():
    def mark(tensor: Tensor, threads: int = 2) -> int:
        return _C.fingerprint([tensor.view(torch.uint8).numpy()], threads)

    torch.manual_seed(0)
    numbers = torch.randn(200_003)
    before = mark(numbers)
    assert all(mark(numbers, threads) == before for threads in (1, 3))
    for change in (
        lambda t: t.neg_(),  # every sign bit, the highest of its word
        lambda t: t[-1:].add_(1e-3),
        lambda t: t.copy_(t.flip(0)),
        lambda t: t[70_000:70_002].copy_(t[70_000:70_002].flip(0)),
    ):
        other = numbers.clone()
        change(other)
        assert mark(other) != before
    swapped = numbers.clone()
    swapped[0], swapped[16] = -numbers[0], -numbers[16]
    assert mark(swapped) != before
