"""Backward passes without a gradient of their own: first gradients as ever, second ones refused."""

import pytest
import torch

from lipfast.ops._once import differentiable_once


class _Square(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, unused):
        ctx.save_for_backward(x)
        return x * x

    @staticmethod
    @differentiable_once
    def backward(ctx, dy):
        (x,) = ctx.saved_tensors
        return 2 * x * dy, None


class _Double(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, unused):
        return 2 * x

    @staticmethod
    @differentiable_once
    def backward(ctx, dy):
        return 2 * dy, None


class _DoubleAlone(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return 2 * x

    @staticmethod
    @differentiable_once
    def backward(ctx, dy):
        return 2 * dy


@pytest.mark.parametrize("create_graph", [False, True])
def test_first_gradients(create_graph):
    x = torch.randn(3, requires_grad=True)
    for y, expected in (_Square.apply(x, None), 2 * x), (_Double.apply(x, 1), 2), (_DoubleAlone.apply(x), 2):
        (gradient,) = torch.autograd.grad(y.sum(), x, create_graph=create_graph)
        assert torch.equal(gradient, torch.ones(3) * expected)
        assert gradient.requires_grad == create_graph


@pytest.mark.parametrize("function", [lambda x: _Square.apply(x, None), _DoubleAlone.apply])
def test_second_gradients_are_refused(function):
    x = torch.randn(3, requires_grad=True)
    (gradient,) = torch.autograd.grad(function(x).sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="double backward is not supported"):
        gradient.sum().backward()
