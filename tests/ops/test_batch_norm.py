"""BatchNorm with its activation, in the reference's plain torch; tests/gpu compares the kernels with it."""

import pytest
import torch
from torch.nn import functional

from lipfast.ops.batch_norm import batch_norm_activate


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("slope", [0.0, 0.2, 1.0])
def test_is_torchs_batch_norm_and_leaky_relu(affine, slope):
    torch.manual_seed(0)
    x = torch.randn(2, 3, 4, 5, dtype=torch.float64, requires_grad=True)
    vectors = [part.requires_grad_() for part in torch.randn(2, 3, dtype=torch.float64)] if affine else [None, None]
    running = torch.rand(2, 3, dtype=torch.float64)
    got = batch_norm_activate(x, *running.clone().unbind(), *vectors, 0.3, 1e-3, slope)
    want = functional.batch_norm(x, *running.unbind(), *vectors, True, 0.3, 1e-3)
    want = functional.leaky_relu(want, slope)
    torch.testing.assert_close(got, want)
    parts, dy = [x, *vectors] if affine else [x], torch.randn_like(got)
    torch.testing.assert_close(torch.autograd.grad(got, parts, dy), torch.autograd.grad(want, parts, dy))
    assert torch.autograd.gradcheck(lambda *p: batch_norm_activate(p[0], None, None, *vectors, 0.3, 1e-3, slope), (x,))


def test_the_running_statistics_move():
    x, running = torch.randn(4, 3, 2, 2), torch.rand(2, 3)
    mine, theirs = running.clone(), running.clone()
    batch_norm_activate(x, *mine.unbind(), None, None, 0.3, 1e-3, 1.0)
    functional.batch_norm(x, *theirs.unbind(), None, None, True, 0.3, 1e-3)
    torch.testing.assert_close(mine, theirs)
    assert not torch.equal(mine, running)
