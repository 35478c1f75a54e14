"""Signs: rounding to them, its straight-through gradient, eight in a byte."""

import pytest
import torch

from partialhn.networks.columns import (
    Columns,
    Scaled,
    Signs,
    pack_signs,
    packed_bytes,
    signs,
    unpack_signs,
)


@pytest.mark.parametrize("rows", [0, 1, 2, 7, 8, 9, 1000])
@pytest.mark.parametrize("width", [1, 3])
def test_packed_signs_come_back(rows, width):
    drawn = signs(torch.randn(rows, width, generator=torch.Generator().manual_seed(rows)))
    packed = pack_signs(drawn)
    assert packed.dtype == torch.uint8
    assert len(packed) == -(-rows * width // 8)
    assert torch.equal(unpack_signs(packed, (rows, width)), drawn)


def test_every_byte_stands_for_its_own_signs():
    everything = torch.cartesian_prod(*[torch.tensor([-1.0, 1.0])] * 8)
    assert sorted(pack_signs(everything).tolist()) == list(range(256))


def test_rounding_is_the_nearest_that_signs_and_a_scale_can_come():
    x_Nd = torch.randn(999, 2, generator=torch.Generator().manual_seed(0)) * torch.tensor(
        [1.0, 7.0]) + 0.3
    found_Nd = Scaled.apply(x_Nd)
    assert (found_Nd.abs().amax(0) == found_Nd.abs().amin(0)).all()
    error_d = (found_Nd - x_Nd).square().sum(0)
    for scale in (0.99, 1.01):
        assert ((scale * found_Nd - x_Nd).square().sum(0) > error_d).all()
    for row in range(0, 999, 97):
        turned_Nd = found_Nd.clone()
        turned_Nd[row] *= -1
        assert ((turned_Nd - x_Nd).square().sum(0) > error_d).all()


def test_columns_of_zeros_stay_zeros():
    x_Nd = torch.zeros(7, 2, requires_grad=True)
    rounded_Nd = Scaled.apply(x_Nd)
    assert torch.equal(rounded_Nd, torch.zeros(7, 2))
    rounded_Nd.sum().backward()
    assert torch.equal(x_Nd.grad, torch.ones(7, 2))


def test_signs_pass_a_gradient_unchanged():
    x_Nd = torch.tensor([[-0.2, 0.0], [3.0, -1e-9]], requires_grad=True)
    found_Nd = Signs.apply(x_Nd)
    assert found_Nd.tolist() == [[-1, 1], [1, -1]]
    (found_Nd * torch.tensor([[1.0, 2.0], [3.0, 4.0]])).sum().backward()
    assert x_Nd.grad.tolist() == [[1, 2], [3, 4]]


def test_fresh_columns_change_nothing_and_learn_at_once():
    torch.manual_seed(0)
    own = Columns([(6, 36), (5, 4)], 3)
    found = own()
    assert [(len(v_Cd), len(A_Dd)) for v_Cd, A_Dd in found] == [(6, 36), (5, 4)]
    for v_Cd, A_Dd in found:
        assert not A_Dd.any()
        assert v_Cd.abs().eq(1).all()


def test_bytes_are_those_of_the_buffers():
    shapes = [(6, 36), (5, 4)]
    own = Columns(shapes, 3)
    own.pack()
    assert packed_bytes(shapes, 3) == sum(value.nbytes for value in own.buffers())
    assert not list(own.parameters())
