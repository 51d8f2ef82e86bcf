"""Accelerated modules do what torch does in the less usual ways to write and use a module, or refuse to."""

import copy
import dataclasses
import threading
import time
import types

import pytest
import torch
import torch.nn.functional as F
import torch.utils.checkpoint
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn.utils import parametrize, prune

import lipfast
from lipfast.errors import InputError

pytestmark = pytest.mark.filterwarnings("ignore:lipfast")  # of operators that run in torch
CHANNELS = 4


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def conv(inputs: int = CHANNELS) -> nn.Conv2d:
    return nn.Conv2d(inputs, CHANNELS, 3, padding=1)


class Written(nn.Module):
    """Modules and a forward function that is given the module first."""

    def __init__(self, forward, **members: nn.Module | Tensor) -> None:
        super().__init__()
        self._forward = forward
        for name, member in members.items():
            if isinstance(member, nn.Module):
                setattr(self, name, member)
            else:
                self.register_buffer(name, member)

    def forward(self, *args):
        return self._forward(self, *args)


def picture(batch: int = 2) -> Tensor:
    return torch.randn(batch, CHANNELS, 7, 6)


def assert_same_training(model: nn.Module, x: Tensor, masks: dict[str, Tensor] | None = None) -> None:
    """Outputs and the gradients of all parameters: accelerated against torch."""
    fast = lipfast.accelerate(model, masks)
    expected, got = model(x), fast(x)
    assert torch.allclose(got, expected, atol=1e-5)
    weight = torch.randn_like(expected)
    (expected * weight).sum().backward()
    (got * weight).sum().backward()
    fast_parameters = dict(fast.named_parameters())
    for name, parameter in model.named_parameters():
        own = name.removesuffix("_orig")
        if parameter.grad is None:
            assert fast_parameters[own].grad is None, own
            continue
        alive = fast.masks.get(own)
        wanted = parameter.grad if alive is None else parameter.grad[alive]
        assert torch.allclose(fast_parameters[own].grad, wanted, atol=1e-4), own


def assert_same_output(model: nn.Module) -> None:
    x = picture()
    with torch.no_grad():
        assert torch.allclose(lipfast.accelerate(model)(x), model(x), atol=1e-5)


def test_pruned_biases_and_norms():
    model = nn.Sequential(conv(), nn.BatchNorm2d(CHANNELS), nn.ReLU(), conv(), nn.PReLU(CHANNELS))
    for module, name in (model[0], "bias"), (model[1], "weight"), (model[1], "bias"), (model[3], "bias"):
        nn.init.normal_(getattr(module, name))
        prune.random_unstructured(module, name, 0.5)
    prune.random_unstructured(model[3], "weight", 0.5)
    assert_same_training(model, picture())


def test_gradients_are_switched_off_inside():
    def forward(self, x):
        with torch.no_grad():
            teacher = self.teacher(x)
        return (self.student(x) - teacher).square() * (2.0 if torch.is_grad_enabled() else 1.0)

    model = Written(forward, teacher=conv(), student=conv())
    assert_same_training(model, picture())
    with torch.no_grad():
        x = picture()
        assert torch.allclose(lipfast.accelerate(model)(x), model(x), atol=1e-5)


class _Reverse(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return 2 * x

    @staticmethod
    def backward(ctx, dy):
        return -dy


def test_functions_with_a_backward_pass_of_their_own_keep_it():
    model = Written(lambda self, x: self.last(_Reverse.apply(self.first(x))), first=conv(), last=conv())
    own = vars(torch.autograd.Function)["apply"]
    with pytest.warns(UserWarning, match=r"_Reverse\.apply: the engine has no such operator"):
        assert_same_training(model, picture())
    assert vars(torch.autograd.Function)["apply"] is own


def test_a_gradient_penalty_is_refused():
    fast, x = lipfast.accelerate(conv()), picture().requires_grad_()
    (gradient,) = torch.autograd.grad(fast(x).sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="double backward is not supported"):
        (gradient.norm() - 1).square().backward()


def _keeps(self, x):
    self.seen = x
    return self.conv(x)


def _notes(self, x):
    self.notes["calls"][0] += 1
    return self.conv(x)


def _averages(self, x):
    self.mean = 0.9 * self.mean + 0.1 * x.mean()
    return self.conv(x)


def _averages_in_data(self, x):
    self.mean.data = self.mean + 1
    return self.conv(x)


def _hooks(self, x):
    y = self.conv(x)
    y.register_hook(lambda dy: 2 * dy)
    return y


def _reads_its_counter(self, x):
    self.count.add_(1)
    return self.conv(x) / self.count


def _takes_its_counter_for_a_number(self, x):
    self.count.add_(1)
    return self.conv(x) / float(self.count)


def _asks_for_numbers(self, x):
    return self.conv(x) * float(x.detach().numpy().sum())


def _asks_for_history(self, x):
    return self.conv(x) * (2 if self.conv(x).grad_fn is not None else 3)


def _changes_autocast(self, x):
    with torch.autocast("cpu", torch.bfloat16):
        return self.conv(x)


def _differentiates(self, x):
    x = x.detach().clone()
    with torch.enable_grad():
        return torch.autograd.grad(self.conv(x).erf().sum(), self.conv.bias, allow_unused=True)[0]


def _goes_back(self, x):
    with torch.enable_grad():
        self.conv(x).erf().sum().backward()
    return self.conv(x)


def _wants_gradients(self, x):
    return self.conv(x.detach().requires_grad_())


def _wants_gradients_by_attribute(self, x):
    y = self.conv(x).detach()
    y.requires_grad = True
    return y


@pytest.mark.parametrize(
    ("forward", "message"),
    [
        (
            _differentiates,
            r"differentiates \(torch.autograd.grad\), which cannot be recorded; accelerate the module whose",
        ),
        (_goes_back, r"differentiates \(Tensor.backward\)"),
        (_wants_gradients, "changes requires_grad of a tensor"),
        (_wants_gradients_by_attribute, "changes requires_grad of a tensor"),
        (_keeps, "forward assigns seen"),
        (_notes, "forward assigns notes"),
        (_averages, "forward assigns mean"),
        (_averages_in_data, "cannot be recorded"),
        (_hooks, "hook"),
        (_reads_its_counter, "reads a counter that it changed"),
        (_takes_its_counter_for_a_number, "reads a counter that it changed"),
        (_asks_for_numbers, r"asks for the numbers of a tensor \(Tensor.numpy\)"),
        (_asks_for_history, r"asks for the history of a tensor \(Tensor.grad_fn\)"),
        (_changes_autocast, "changes autocast"),
    ],
)
def test_state_that_a_recording_would_lose_is_refused_and_left_alone(forward, message):
    model = Written(forward, conv=conv(), mean=torch.zeros(()), count=torch.tensor(0))
    model.notes = {"calls": [0]}
    fast = lipfast.accelerate(model)
    with pytest.raises(InputError, match=message):
        fast(picture())
    assert not hasattr(fast, "seen")
    assert all(tensor.device.type == "cpu" for tensor in fast.state_dict().values())
    model(picture())  # is right as it is


def test_requires_grad_may_be_set_to_what_it_is():
    def forward(self, x):
        y = self.conv(x.requires_grad_(x.requires_grad)).requires_grad_(torch.is_grad_enabled())
        y.detach().requires_grad = False
        return y

    model = Written(forward, conv=conv())
    assert_same_output(model)
    assert_same_training(model, picture())


def test_a_module_that_another_one_differentiates():
    def forward(self, x):
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            y = self.inner(x)
            return x - torch.autograd.grad(y, x, x - y)[0]

    model, x = Written(forward, inner=nn.Sequential(conv(), nn.ReLU(), conv())), picture()
    expected = model(x)
    with pytest.raises(InputError, match="accelerate the module whose derivative it takes"):
        lipfast.accelerate(Written(lambda self, x: torch.autograd.grad(self.inner(x), x)[0], inner=conv()))(x)
    model.inner = lipfast.accelerate(model.inner)
    assert torch.allclose(model(x), expected, atol=1e-5)


def test_a_counter_that_only_counts_keeps_counting():
    model = Written(lambda self, x: (self.count.add_(2), self.conv(x))[1], conv=conv(), count=torch.tensor(0))
    fast = lipfast.accelerate(model)
    for _ in range(3):
        fast(picture())
    assert int(fast.state_dict()["count"]) == 6


@dataclasses.dataclass
class _Output:
    sample: Tensor


class _Slots:
    __slots__ = ("sample",)

    def __init__(self, sample: list[Tensor]) -> None:
        self.sample = sample


@pytest.mark.parametrize(
    ("hide", "name"),
    [
        (_Output, "_Output"),
        (lambda y: _Slots([y]), "_Slots"),
        (lambda y: {"sample": y}.values(), "dict_values"),
        (lambda y: zip([y], [1], strict=True), "zip"),
        (lambda y: frozenset([y]), "frozenset"),
        (lambda y: (y for _ in range(2)), "generator"),
        (lambda y: [lambda: y], "function"),
    ],
)
def test_containers_that_hide_tensors_are_refused(hide, name):
    fast = lipfast.accelerate(Written(lambda self, x: hide(self.conv(x)), conv=conv()))
    with pytest.raises(InputError, match=f"returns tensors in a {name}"):
        fast(picture())


def test_results_without_tensors_may_be_anything():
    settings = types.SimpleNamespace(scale=[2.0])
    fast = lipfast.accelerate(Written(lambda self, x: (self.conv(x), settings, len, {1, 2}), conv=conv()))
    assert fast(picture())[1:] == (settings, len, {1, 2})


def test_arguments_without_a_hash_are_refused():
    fast = lipfast.accelerate(Written(lambda self, x, _: self.conv(x), conv=conv()))
    with pytest.raises(InputError, match="neither a tensor nor hashable"):
        fast(picture(), {0, 1})


@dataclasses.dataclass(frozen=True)
class Holder:
    held: object


def test_slices_up_to_a_tensors_number_are_refused():
    fast = lipfast.accelerate(Written(lambda self, x, given: self.conv(x[..., : given.held]), conv=conv()))
    for stop in 5, 6:
        assert fast(picture(), Holder(stop)).shape == fast.to_dense()(picture(), Holder(stop)).shape
    with pytest.raises(InputError, match="slices by the number of a tensor"):
        fast(picture(), Holder(torch.tensor(5)))


def test_what_changes_between_two_calls_is_seen():
    model = nn.Sequential(conv(), nn.BatchNorm2d(CHANNELS), nn.ReLU(), nn.Dropout(0.0))
    fast, x = lipfast.accelerate(model), picture()
    fast(x), model(x)
    for network in (fast, model):
        network.get_submodule("1").momentum = 0.7
        network.get_submodule("1").eps = 0.5
        network.get_submodule("3").p = 1.0
    got = fast(x)
    assert torch.equal(got, torch.zeros_like(got))
    for network in (fast, model):
        network.get_submodule("3").p = 0.0
    fast._modules["2"] = model[2] = nn.Tanh()
    assert torch.allclose(fast(x), model(x), atol=1e-5)
    assert not torch.equal(got, fast(x))


@dataclasses.dataclass
class _Factors:
    of_channels: list[float]


@pytest.mark.parametrize(
    ("settings", "factor", "change"),
    [
        ({"a": [2.0]}, lambda held: held["a"][0], lambda held: held["a"].insert(0, 3.0)),
        (_Factors([2.0]), lambda held: held.of_channels[0], lambda held: held.of_channels.insert(0, 3.0)),
        (types.SimpleNamespace(a=2.0), lambda held: held.a, lambda held: setattr(held, "a", 3.0)),
        ({1, 2}, lambda held: max(held), lambda held: held.add(3)),
    ],
)
def test_what_changes_inside_an_attribute_is_seen(settings, factor, change):
    model = Written(lambda self, x: factor(self.settings) * self.conv(x), conv=conv())
    model.settings = settings
    fast, x = lipfast.accelerate(model), picture()
    before = fast(x)
    assert len(fast._compiled) == 1
    change(model.settings), change(fast.settings)
    assert torch.allclose(fast(x), model(x), atol=1e-5)
    assert not torch.equal(fast(x), before)
    known = next(iter(fast._compiled.values()))
    fast(x)
    assert next(iter(fast._compiled.values())) is known  # an unchanged one is not recorded again


def _by_gradients_of_inputs(self, x, y):
    return self.conv(x) * (2 if x.requires_grad else 3)


def _by_gradients_of_weights(self, x, y):
    return self.conv(x) * (2 if self.conv.weight.requires_grad else 3)


def _by_gradients_of_results(self, x, y):
    features = F.relu(self.conv(x))
    return features * (2 if features.requires_grad else 3) * (5 if features.detach().requires_grad else 1)


def _by_identity(self, x, y):
    return self.conv(x) * (2 if x is y else 3) + y


def _by_device(self, x, y):
    known = x.device.type == "cpu" and x.is_cpu and not x.is_meta and not self.conv.weight.is_cuda
    return self.conv(x) * (2 if known and self.conv(x).get_device() == -1 else 3)


def _made_on_its_device(self, x, y):
    columns = torch.arange(x.shape[-1], device=x.device, dtype=x.dtype) + torch.ones(1).to(y.device)
    return self.conv(x) + torch.sin(columns)


def _by_autocast(self, x, y):
    return torch.sin(self.conv(x).float()) * (2 if torch.is_autocast_enabled("cpu") else 3)


@pytest.mark.parametrize(
    "forward",
    [
        _by_gradients_of_inputs,
        _by_gradients_of_weights,
        _by_gradients_of_results,
        _by_identity,
        _by_device,
        _made_on_its_device,
        _by_autocast,
    ],
)
def test_what_code_may_ask_of_its_arguments(forward):
    model = Written(forward, conv=conv())
    fast, x = lipfast.accelerate(model), picture()
    for trained in True, False:
        for network in model, fast:
            network.get_submodule("conv").requires_grad_(trained)
        for given in (x, x), (x, x.clone()), (x.clone().requires_grad_(), x):
            for grad in True, False:
                with torch.set_grad_enabled(grad):
                    assert torch.allclose(fast(*given), model(*given), atol=1e-5)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.allclose(fast(x, x).float(), model(x, x).float(), atol=0.1)


@pytest.mark.parametrize("asked", [lambda x: x.is_contiguous(), lambda x: x.stride()[1] > 1])
def test_a_layout_that_is_asked_for_must_be_contiguous(asked):
    model = Written(lambda self, x: self.conv(x) * (2 if asked(x) else 3), conv=conv())
    fast, x = lipfast.accelerate(model), picture()
    assert torch.allclose(fast(x), model(x), atol=1e-5)
    with pytest.raises(InputError, match="contiguous inputs, parameters and buffers only"):
        fast(x.to(memory_format=torch.channels_last))
    assert torch.allclose(fast(x), model(x), atol=1e-5)


def _changes_a_copy(self, x):
    y = self.conv(x)
    z = y.contiguous()
    z.relu_()
    return y + z


def _changes_what_was_copied(self, x):
    y = torch.exp(x)
    z = y.to(memory_format=torch.channels_last)
    y.relu_()
    return self.conv(z)


@pytest.mark.parametrize("forward", [_changes_a_copy, _changes_what_was_copied])
def test_what_may_or_may_not_be_a_copy_must_not_change(forward):
    model = Written(forward, conv=conv())
    fast, x = lipfast.accelerate(model), picture()
    assert torch.allclose(fast(x.clone()), model(x.clone()), atol=1e-5)
    with pytest.raises(InputError, match="in place that contiguous"):
        fast(x.to(memory_format=torch.channels_last))


def test_what_is_made_contiguous_has_all_views():
    model = Written(lambda self, x: torch.sin(self.conv(x)).contiguous().view(2, -1), conv=conv())
    x = picture().to(memory_format=torch.channels_last)
    assert torch.allclose(lipfast.accelerate(model)(x), model(x), atol=1e-5)


def test_hooks_that_come_later_are_refused():
    fast, x = lipfast.accelerate(nn.Sequential(conv(), nn.ReLU())), picture()
    fast(x)
    fast.get_submodule("0").register_forward_hook(lambda module, args, result: 2 * result)
    with pytest.raises(InputError, match="module '0' has hooks"):
        fast(x)


def test_another_layer_in_the_place_of_a_pruned_one_is_refused():
    model = nn.Sequential(conv(), nn.ReLU(), conv())
    fast, x = lipfast.accelerate(model, {"2.weight": torch.rand(model[2].weight.shape) < 0.5}), picture()
    fast(x)
    fast._modules["2"] = conv()
    with pytest.raises(InputError, match=r"'2\.weight' was replaced"):
        fast(x)


def test_another_dense_layer_is_taken():
    model = nn.Sequential(conv(), nn.ReLU(), conv())
    fast, x = lipfast.accelerate(model), picture()
    fast(x)
    fast._modules["2"] = model[2] = nn.Conv2d(CHANNELS, 9, 1)
    assert torch.allclose(fast(x), model(x), atol=1e-5)


def test_threads_may_share_a_module_that_was_never_called():
    def forward(self, x):
        time.sleep(0.02)  # in the recording: others arrive while stand-ins lie in the place of parameters
        return self.last(F.softplus(self.first(x)))

    model = Written(forward, first=conv(), last=conv()).eval()
    fast = lipfast.accelerate(model)
    wrong: list[float] = []

    def call(size: int) -> None:
        x = torch.randn(1, CHANNELS, size, 6)
        with torch.no_grad():
            wrong.append(float((fast(x) - model(x)).abs().max()))

    threads = [threading.Thread(target=call, args=(4 + i,)) for i in range(5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(wrong) == 5
    assert max(wrong) < 1e-5


def test_a_batch_norm_used_three_times_trains():
    def forward(self, x):
        for _ in range(3):
            x = x + self.norm(self.conv(x)).relu()
        return x

    assert_same_training(Written(forward, conv=conv(), norm=nn.BatchNorm2d(CHANNELS)), picture())


def test_another_default_dtype(request):
    model, x = nn.Sequential(conv(), nn.ReLU()), picture()
    request.addfinalizer(lambda: torch.set_default_dtype(torch.float32))
    torch.set_default_dtype(torch.float64)
    assert_same_training(model, x)


def test_autocast_around_an_operator_of_torch():
    model = nn.Sequential(conv(), nn.Conv2d(CHANNELS, CHANNELS, 17, padding=8), conv())
    fast, x = lipfast.accelerate(model), picture()
    with torch.autocast("cpu", torch.bfloat16):
        got = fast(x)
    assert torch.allclose(got.float(), model(x), atol=0.05)


def test_empty_slices():
    model = Written(lambda self, x: torch.cat([self.conv(x), self.conv(x)[:, :0]], 1), conv=conv())
    assert_same_training(model, picture())


@pytest.mark.parametrize("mode", ["nearest", "bilinear"])
@pytest.mark.parametrize(
    ("side", "size"), [(16, {"size": 98}), (8, {"size": 82}), (18, {"scale_factor": 1.05}), (2, {"scale_factor": 2.2})]
)
def test_enlarging_takes_the_pixels_that_torch_takes(side, size, mode):
    """Where float32 positions round to another pixel, or torch has a short cut."""
    model = Written(lambda self, x: F.interpolate(self.conv(x), mode=mode, **size), conv=conv())
    x = torch.randn(1, CHANNELS, side, side)
    with torch.no_grad():
        assert torch.allclose(lipfast.accelerate(model)(x), model(x), atol=1e-5)


def test_a_mean_over_another_axis_is_no_pixel_norm():
    def forward(self, x):
        return self.conv(x / torch.sqrt(x.square().mean(-3, keepdim=True) + 1e-8))

    x = torch.randn(CHANNELS, 6, 7)
    model = Written(forward, conv=conv())
    with torch.no_grad():
        assert torch.allclose(lipfast.accelerate(model)(x), model(x), atol=1e-5)


def test_the_gradient_of_hardswish_at_its_bound():
    layer = nn.Conv2d(1, 1, 1, bias=False)
    nn.init.ones_(layer.weight)
    x = torch.tensor([-3.0, 3.0]).view(1, 1, 1, 2).requires_grad_()
    lipfast.accelerate(nn.Sequential(layer, nn.Hardswish()))(x).sum().backward()
    assert x.grad.flatten().tolist() == [0.0, 1.0]


@pytest.mark.parametrize("also", [None, 0.5, 0.25])
def test_a_shared_weight_that_is_not_pruned_alike_is_refused(also):
    model = nn.Sequential(conv(), nn.ReLU(), conv())
    model[2].weight = model[0].weight
    prune.l1_unstructured(model[0], "weight", 0.5)
    if also is not None:
        model[2].weight = nn.Parameter(torch.empty(0))
        model[2].weight = model[0].weight_orig
        prune.l1_unstructured(model[2], "weight", also)
    if also == 0.5:
        assert_same_output(model)
        return
    with pytest.raises(InputError, match="are one parameter, but not pruned alike"):
        lipfast.accelerate(model)


def test_two_masks_of_a_shared_weight_are_refused():
    model = nn.Sequential(conv(), nn.ReLU(), conv())
    model[2].weight = model[0].weight
    masks = {f"{k}.weight": torch.rand(model[0].weight.shape) < 0.5 for k in (0, 2)}
    with pytest.raises(InputError, match="are one parameter with two masks"):
        lipfast.accelerate(model, masks)


def two_headed() -> Written:
    def forward(self, x):
        y = torch.relu(self.body(x))
        return self.first(y), self.second(y)

    return Written(forward, body=conv(), first=conv(), second=conv())


def test_weights_that_the_loss_does_not_reach_get_no_gradient():
    fast = lipfast.accelerate(two_headed())
    fast(picture())[0].sum().backward()
    assert {name for name, p in fast.named_parameters() if p.grad is None} == {"second.weight", "second.bias"}
    assert fast.body.weight.grad.abs().sum() > 0


def test_pruned_weights_that_the_loss_does_not_reach_get_no_gradient():
    def forward(self, x):
        return self.first(x), self.second(F.softplus(self.norm(F.linear(x, self.features.weight))))

    parts = {"first": conv(), "second": conv(), "norm": nn.BatchNorm2d(CHANNELS), "features": nn.Linear(6, 6)}
    fast = lipfast.accelerate(Written(forward, **parts), {"features.weight": torch.rand(6, 6) < 0.5})
    fast(picture())[0].sum().backward()
    assert fast.features.weight.grad is None


def test_a_pruned_layer_of_torch_sees_new_weights_between_calls_without_gradients():
    model = nn.Sequential(conv(), nn.Conv2d(CHANNELS, CHANNELS, 17, padding=8))
    model[1].weight.data.mul_(torch.rand(model[1].weight.shape) < 0.3)
    fast, x = lipfast.accelerate(model), picture()
    with torch.no_grad():
        before = [fast(x) for _ in range(3)]  # of which the last ones ask torch for writes
        fast.get_parameter("1.weight").data.mul_(2)
        after = fast(x)
        fast.load_state_dict(model.state_dict())
        again = fast(x)
    assert all(torch.equal(one, before[0]) for one in (*before, again))
    assert not torch.allclose(after, again)
    assert torch.allclose(before[0], model(x), atol=1e-5)


def test_a_pruned_weight_that_is_returned_is_the_callers():
    def forward(self, x):
        return self.first(x), self.second(x), self.first.weight.flatten(1), self.second.weight

    parts = {name: nn.Conv2d(CHANNELS, CHANNELS, 17, padding=8) for name in ("first", "second")}
    masks = {f"{name}.weight": torch.rand(part.weight.shape) < 0.3 for name, part in parts.items()}
    fast, x = lipfast.accelerate(Written(forward, **parts), masks), picture()
    with torch.no_grad():
        before = fast(x)
        for weight in before[2:]:
            weight.mul_(3)
        after = fast(x)
    assert all(torch.equal(one, other) for one, other in zip(before[:2], after[:2], strict=True))


def test_a_pruned_layer_of_torch_in_one_mode_after_another():
    def forward(self, x):
        with torch.enable_grad():
            return self.conv(x)

    model = Written(forward, conv=nn.Conv2d(CHANNELS, CHANNELS, 17, padding=8))
    model.conv.weight.data.mul_(torch.rand(model.conv.weight.shape) < 0.3)
    fast, x = lipfast.accelerate(model), picture().requires_grad_()
    with torch.inference_mode():
        fast(x)
    with torch.no_grad():
        results = fast(x), model(x)
    gradients = [torch.autograd.grad(result.sum(), x)[0] for result in results]
    assert torch.allclose(gradients[0], gradients[1], atol=1e-5)


def test_statistics_are_read_before_and_behind_they_change():
    def forward(self, x):
        y = self.second(self.norm(self.first(x) * self.norm.running_var) + self.norm.running_mean)
        return y * self.norm.running_var

    model = Written(forward, first=nn.Linear(9, 6), second=nn.Linear(6, 6), norm=nn.BatchNorm1d(6))
    masks = {f"{name}.weight": torch.rand(6, side) < 0.25 for name, side in (("first", 9), ("second", 6))}
    for name, mask in masks.items():
        model.get_parameter(name).data.mul_(mask)
    x = 5 * torch.randn(20, 9)
    fast = lipfast.accelerate(model, masks)
    for _ in range(2):
        assert torch.allclose(fast(x), model(x), atol=1e-4)


def test_a_checkpointed_layer_is_a_layer():
    def forward(self, x):
        return torch.utils.checkpoint.checkpoint(self.conv, x, use_reentrant=True)

    model = Written(forward, conv=conv())
    mask = torch.rand(model.conv.weight.shape) < 0.3
    model.conv.weight.data.mul_(mask)
    x = picture().requires_grad_()
    assert torch.allclose(lipfast.accelerate(model, {"conv.weight": mask})(x), model(x), atol=1e-5)


class _Runs(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, module):
        return module(x)


def test_a_function_that_is_given_a_module_is_refused():
    fast = lipfast.accelerate(Written(lambda self, x: _Runs.apply(x, self.conv), conv=conv()))
    with pytest.raises(InputError, match=r"_Runs\.apply is given a module"):
        fast(picture())


def test_a_module_with_an_accelerated_part_may_be_compiled():
    fast = lipfast.accelerate(conv())
    whole, x = nn.Sequential(fast, nn.ReLU()), picture()
    assert torch.allclose(torch.compile(whole, backend="eager")(x), whole(x), atol=1e-6)


def test_a_second_backward_pass_wants_retain_graph():
    fast = lipfast.accelerate(two_headed())
    loss = fast(picture())[0].sum()
    loss.backward(retain_graph=True)
    once = fast.body.weight.grad.clone()
    loss.backward()
    assert torch.equal(fast.body.weight.grad, 2 * once)
    with pytest.raises(RuntimeError, match="a second time"):
        loss.backward()


def test_a_loss_that_is_kept_after_its_backward_pass_keeps_no_program():
    fast = lipfast.accelerate(conv())
    kept = []
    for _ in range(3):
        kept.append(fast(picture()).sum())
        kept[-1].backward()
    ((compiled),) = fast._compiled.values()
    assert sum(len(free) for runner in compiled._items for free in runner._free.values()) == 1


def test_hooks_on_saved_tensors():
    fast = lipfast.accelerate(conv())
    x = picture()
    fast(x).square().sum().backward()
    expected = fast.weight.grad.clone()
    for hooks in "checkpoint", "save_on_cpu":
        fast.weight.grad = None
        if hooks == "checkpoint":
            y = torch.utils.checkpoint.checkpoint(fast, x, use_reentrant=False)
        else:
            with torch.autograd.graph.save_on_cpu():
                y = fast(x)
        y.square().sum().backward()
        assert torch.equal(fast.weight.grad, expected), hooks


@pytest.mark.parametrize("generator", [torch.default_generator, torch.Generator()], ids=["torch's", "its own"])
def test_recording_draws_no_random_numbers_of_torch(generator):
    given = {} if generator is torch.default_generator else {"generator": generator}
    model = Written(lambda self, x: self.layer(x) + torch.randn(6, device="cpu", **given), layer=conv())
    fast, x = lipfast.accelerate(model), picture()
    results = []
    for module in model, fast:
        generator.manual_seed(3)
        results.append(module(x))
    assert torch.allclose(*results, atol=1e-5)


def test_recording_leaves_what_other_threads_draw():
    drawn = []

    def forward(self, x):
        thread = threading.Thread(target=lambda: drawn.append(torch.rand(4)))
        thread.start()
        thread.join()
        return self.layer(x)

    lipfast.accelerate(Written(forward, layer=conv()))(picture())
    assert not torch.equal(drawn[0], torch.rand(4))


def test_a_picture_whose_negative_bit_is_set():
    z = torch.randn(2, CHANNELS, 9, 7, dtype=torch.complex64)
    x = z.conj().imag
    assert x.is_neg()
    model = conv()
    assert torch.allclose(lipfast.accelerate(model)(x), model(x), atol=1e-5)


def test_statistics_that_the_module_computes():
    def forward(self, x):
        return self.last(F.batch_norm(self.layer(x), self.mean * 2, self.variance.exp()))

    numbers = {"mean": torch.randn(CHANNELS), "variance": torch.randn(CHANNELS)}
    assert_same_output(Written(forward, layer=conv(), last=conv(), **numbers))


def a_mask(self, x):
    mask = torch.zeros(1, 1, *x.shape[2:])
    for number, rows in enumerate((slice(0, 2), slice(3, None))):
        mask[..., rows, 1:] = number + 0.5
    return self.last(self.layer(x) * mask)


def a_map(self, x):
    y = self.layer(x)
    y[:, 1, 2:] = x[:, 0, 2:]
    y[y < 0] = 0.5
    return self.last(y) + y


def twice(self, x):
    y = self.layer(x)
    z = y * 1
    z[0] = 1
    y[1:] = z[:1]
    return self.last(z) * y


def added(self, x):
    y = self.layer(x)
    y[:, 1:3] += x[:, :2]
    y[:, :2] = y[:, :2] * 0.5 + y[:, 1:3]
    y[0, 1] *= 2
    return self.last(y) + y


def filled(self, x):
    y = self.layer(x)
    y[0].zero_()
    y[:, 1:3].fill_(0.5)
    for other in (y[:, 0, 2:] * 2, y[:, [0, 2]], y[:, torch.arange(2)]):
        other.zero_()
    return self.last(y) + y


def a_filled_part(self, x):
    part = self.layer(x)[:, :2]
    other = part[:, :1].zero_()
    return part.repeat(1, 2, 1, 1) * (other + self.last(x))


def of_another_type(self, x):
    """Zeros and ones that have more digits than their like, or none."""
    wide = (x.double().new_ones(7, 6) + 1e-9 - 1) * 1e9
    counts = x.new_ones((CHANNELS, 1, 1), dtype=torch.int64) // 2
    counts[:2] = 3
    return self.last(self.layer(x) * counts + wide.float()) + x.new_zeros((), dtype=torch.float64).to(x.dtype)


def of_a_view(self, x):
    y = self.layer(x).flatten(2)[:, :, 1:]
    y[..., 3:] -= 1
    y.mul_(2)
    return y


def gone(self, x):
    y = self.layer(x)
    z = self.last(y[:, :2].repeat(1, 2, 1, 1))
    y.add_(1)
    return z * y


@pytest.mark.parametrize(
    "forward", [a_mask, a_map, twice, added, filled, a_filled_part, of_another_type, of_a_view, gone]
)
def test_assignments_to_parts(forward):
    model = Written(forward, layer=conv(), last=conv())
    prune.random_unstructured(model.layer, "weight", 0.5)
    assert_same_output(model)
    assert_same_training(model, picture())


def read_a_view(y, x):
    part = y[:, :1]
    y[:, 0] = 1
    return part


def read_the_whole(y, x):
    y[:, :1].add_(1)
    return y


def read_a_part_before_it_was_filled(y, x):
    part = y[:, :2]
    y[:, :1].zero_()
    return part


def read_what_a_part_of_a_part_is_of(y, x):
    y[:, :2][:, 0].fill_(1)
    return y


def put_back_elsewhere(y, x):
    part = y[:, :1]
    part += 1
    y[:, 1:2] = part
    return y


def put_back_after_another_write(y, x):
    part = y[:, :1]
    y[:, 1:].add_(1)
    part += 1
    y[:, :1] = part
    return y


@pytest.mark.parametrize(
    "change",
    [
        read_a_view,
        read_the_whole,
        read_a_part_before_it_was_filled,
        read_what_a_part_of_a_part_is_of,
        put_back_elsewhere,
        put_back_after_another_write,
    ],
)
def test_what_shares_memory_that_was_written_is_not_read(change):
    model = Written(lambda self, x: change(self.layer(x), x), layer=conv())
    with pytest.raises(InputError, match="shares its memory"):
        lipfast.accelerate(model)(picture())


WRITES = {
    "a part": lambda t: t[:, :2].add_(1),
    "a part of a part": lambda t: t[:, :2][0].__setitem__(0, 7.0),
    "a part that is filled": lambda t: t[:, :2].zero_(),
    "all of it": lambda t: t.mul_(2),
    "an alias": lambda t: t.detach().add_(1),
    "another shape": lambda t: t.reshape(-1).add_(1),
    "by an activation": lambda t: F.relu(t[:, :], inplace=True),
    "behind a conversion that does nothing": lambda t: t.float().add_(1),
}


@pytest.mark.parametrize("write", WRITES.values(), ids=WRITES)
def test_writes_to_plain_attributes_are_refused(write):
    def forward(self, x):
        y = self.layer(x)
        write(self.plain)
        return y + self.plain

    model = Written(forward, layer=conv())
    model.plain = torch.zeros(1, CHANNELS, 7, 6)
    with pytest.raises(InputError, match="keeps as a plain attribute"):
        lipfast.accelerate(model)(picture())


def test_plain_attributes_are_converted():
    def forward(self, x):
        plain = self.plain.to(x.device).float().type_as(x)
        return self.layer(x) * plain + self.plain.expand_as(x)

    model = Written(forward, layer=conv())
    model.plain = torch.randn(1, CHANNELS, 7, 6)
    assert_same_output(model)
    assert_same_training(model, picture())


def no_dropout(self, x):
    y = self.layer(x)
    part = F.dropout(y, 0.0)
    part += 1
    return self.last(y) + part


def detached(self, x):
    y = self.layer(x)
    return self.last(y.detach_()) * y + self.other(x)


@pytest.mark.parametrize("forward", [no_dropout, detached])
def test_what_torch_gives_back_as_it_was(forward):
    assert_same_training(Written(forward, layer=conv(), last=conv(), other=conv()), picture())


def test_results_with_the_channels_behind_may_be_written():
    def forward(self, x):
        y = self.layer(x).permute(0, 2, 3, 1)
        y[..., :2] += 1
        return y

    model = Written(forward, layer=conv())
    assert_same_training(model, picture())
    y = lipfast.accelerate(model)(picture())
    y[..., :2] += 1
    y.sum().backward()


def test_what_may_be_a_copy_where_torch_has_a_view_is_not_written():
    """In torch such a map lies with the channels behind, so that this is a view."""

    def forward(self, x):
        y = self.layer(x)
        flat = torch.reshape(input=y.permute(0, 2, 3, 1), shape=(len(x), -1))
        flat += 1
        return y * 1

    fast = lipfast.accelerate(Written(forward, layer=conv()).to(memory_format=torch.channels_last))
    with pytest.raises(InputError, match="may have copied"):
        fast(picture().contiguous(memory_format=torch.channels_last))


@pytest.mark.parametrize("write", [lambda part: part.add_(1), lambda part: part.fill_(1)])
def test_writes_to_parts_of_buffers_are_refused(write):
    def forward(self, x):
        write(self.numbers[:2])
        return self.layer(x)

    with pytest.raises(InputError, match="its own parameters or buffers"):
        lipfast.accelerate(Written(forward, layer=conv(), numbers=torch.zeros(4)))(picture())


@pytest.mark.parametrize("shape", [(CHANNELS, 1, 1), (CHANNELS, 1), (1, CHANNELS, 1), (CHANNELS,), (1, CHANNELS)])
@pytest.mark.parametrize("axes", [1, 2, 3])
@pytest.mark.parametrize("operator", [torch.mul, torch.add])
def test_numbers_for_channels_of_a_map_without_its_axes(shape, axes, operator):
    """As many pictures as channels, so that a parameter for either fits."""

    def forward(self, x):
        y = self.layer(x).mean((2, 3), keepdim=axes == 3)
        return operator(y.unsqueeze(-1) if axes == 2 else y.squeeze(-1), self.numbers)

    model = Written(forward, layer=conv())
    model.numbers = nn.Parameter(torch.randn(shape))
    prune.random_unstructured(model.layer, "weight", 0.5)
    assert_same_training(model, picture(batch=CHANNELS))


def test_plain_tensors_in_the_place_of_pruned_weights():
    model = nn.Sequential(conv(), nn.ReLU(), conv())
    prune.random_unstructured(model[0], "weight", 0.5)
    fast, x = lipfast.accelerate(model), picture()
    given = {name: 2 * p.detach() for name, p in fast.named_parameters()}
    got = torch.func.functional_call(fast, given, (x,))
    for p in fast.parameters():
        p.data *= 2
    assert torch.equal(got, fast(x))


def test_batched_gradients_are_refused():
    fast, x = lipfast.accelerate(conv()), picture()
    with pytest.raises(InputError, match="is_grads_batched"):
        torch.autograd.functional.jacobian(fast, x, vectorize=True)


def test_under_another_default_device():
    fast, x = lipfast.accelerate(conv()), picture()
    expected = fast(x)
    with torch.device("meta"):
        got = fast(x)
        got.sum().backward()
    assert torch.equal(got, expected)


@pytest.mark.filterwarnings("ignore:.*torch.jit")  # torch's own
def test_what_looks_into_the_code_is_refused():
    fast, x = lipfast.accelerate(conv()), picture()
    with pytest.raises(InputError, match=r"torch\.func"):
        torch.func.jvp(fast, (x,), (x,))
    with pytest.raises(InputError, match=r"torch\.func"):
        torch.vmap(fast)(x[None])
    with pytest.raises(InputError, match=r"torch\.jit\.trace"):
        torch.jit.trace(fast, x)
    with pytest.raises(InputError, match=r"torch\.export"):
        torch.export.export(fast, (x,))
    with torch.no_grad(), forward_ad.dual_level():
        with pytest.raises(InputError, match="forward-mode"):
            fast(forward_ad.make_dual(x, x))
        assert fast(x).shape == x.shape  # one without a tangent
    for model in fast, nn.Sequential(fast):
        with pytest.raises(InputError, match="accelerated already"):
            lipfast.accelerate(model)


class Scaled(nn.Module):
    shift = 0.0

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.scale, self.note, self.head = conv(), 2.0, "none", None
        prune.random_unstructured(self.layer, "weight", 0.5)

    def forward(self, x):
        return self.layer(x) * self.scale + self.shift + getattr(self, "more", 0.0)

    def get_extra_state(self):
        return self.note

    def set_extra_state(self, state):
        self.note = state

    def encode(self, x):
        return self.layer(x)


def test_attributes_are_the_originals_and_methods_are_not():
    fast, x = lipfast.accelerate(Scaled()), picture()
    once = fast(x)
    assert (fast.scale, fast.head) == (2.0, None)
    fast.scale = 6.0
    assert torch.allclose(fast(x), 3 * once, atol=1e-5)
    assert fast.to_dense().scale == 6.0
    fast.shift, fast.more = 1.0, 2.0  # of the class, and new
    assert torch.allclose(fast(x), 3 * once + 3, atol=1e-5)
    with pytest.raises(AttributeError, match=r"'encode'.*to_dense\(\)"):
        fast.encode(x)
    del fast.shift, fast.more
    assert fast.to_dense().shift == Scaled.shift
    assert not hasattr(fast, "more")
    with pytest.raises(AttributeError, match="more"):
        del fast.more


def test_extra_state_and_hooks_of_state_dicts():
    model = Scaled()

    def rename(module, state, prefix, metadata):
        state[prefix + "renamed"] = state.pop(prefix + "layer.weight")

    model.register_state_dict_post_hook(rename)
    fast = lipfast.accelerate(model)
    fast.note = "kept"
    state = fast.state_dict()
    assert state["_extra_state"] == "kept"
    assert torch.equal(state["renamed"], fast.to_dense().layer.weight)
    state["layer.weight"] = state.pop("renamed")
    other = lipfast.accelerate(model)
    other.load_state_dict(state)
    assert other.note == "kept"


def test_attributes_may_have_the_names_of_ours():
    model = Written(lambda self, x: self.layer(x) * self._exact * self._masks["k"] * self._compiled, layer=conv())
    model._exact, model._masks, model._compiled = True, {"k": 3.0}, 2.0
    fast, x = lipfast.accelerate(model), picture()
    for module in fast, copy.deepcopy(fast), fast.to_dense():
        assert torch.allclose(module(x), model(x), atol=1e-5)


class Halved(nn.Module):
    def forward(self, weight):
        return weight * (torch.arange(weight.numel()).reshape(weight.shape) % 2)


def test_a_frozen_parametrized_weight_stays_frozen():
    model = conv()
    parametrize.register_parametrization(model, "weight", Halved())
    model.parametrizations.weight.original.requires_grad_(False)
    fast = lipfast.accelerate(model)
    assert not fast.weight.requires_grad
    assert fast.bias.requires_grad


@pytest.mark.parametrize(
    ("mode", "kernel", "padding", "size"),
    [("reflect", (5, 7), (2, 3), (3, 7)), ("circular", (3, 7), (1, 3), (2, 7)), ("reflect", (1, 3), (0, 1), (1, 8))],
)
def test_padding_as_wide_as_one_side_alone_allows(mode, kernel, padding, size):
    model = nn.Conv2d(CHANNELS, CHANNELS, kernel, padding=padding, padding_mode=mode)
    assert_same_training(model, torch.randn(2, CHANNELS, *size))
