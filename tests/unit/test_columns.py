"""Ternary numbers: rounding, its straight-through gradient, five digits in a byte."""

import pytest
import torch

from partialhn.columns import Columns, Ternary, pack, packed_bytes, rounded, unpack


@pytest.mark.parametrize("rows", [0, 1, 2, 4, 5, 6, 243, 1000])
@pytest.mark.parametrize("width", [1, 3])
def test_packed_digits_come_back(rows, width):
    digits = torch.randint(-1, 2, (rows, width), generator=torch.Generator().manual_seed(rows))
    packed = pack(digits.float())
    assert packed.dtype == torch.uint8
    assert len(packed) == -(-rows * width // 5)
    assert torch.equal(unpack(packed, (rows, width)), digits.float())


def test_every_byte_of_five_digits_is_used_once():
    everything = torch.cartesian_prod(*[torch.tensor([-1.0, 0.0, 1.0])] * 5)
    packed = pack(everything)
    assert sorted(packed.tolist()) == list(range(243))


def test_rounding_is_the_best_ternary_code_of_a_normal_distribution():
    """Mean squared error of the Lloyd-Max quantiser with three levels: 0.1902."""
    x_Nd = torch.randn(100_000, 2, generator=torch.Generator().manual_seed(0)) * torch.tensor(
        [1.0, 7.0])
    found_Nd = Ternary.apply(x_Nd)
    error_d = (found_Nd - x_Nd).square().mean(0) / x_Nd.square().mean(0)
    torch.testing.assert_close(error_d, torch.full((2,), 0.1902), rtol=0.02, atol=0)
    for scale in (0.9, 1.1):
        digits_Nd, scale_d = rounded(x_Nd)
        worse_d = (digits_Nd * scale_d * scale - x_Nd).square().mean(0) / x_Nd.square().mean(0)
        assert (worse_d > error_d).all()


def test_columns_of_zeros_are_zeros_and_not_numbers_divided_by_zero():
    x_Nd = torch.zeros(7, 2, requires_grad=True)
    rounded_Nd = Ternary.apply(x_Nd)
    assert torch.equal(rounded_Nd, torch.zeros(7, 2))
    rounded_Nd.sum().backward()
    assert torch.equal(x_Nd.grad, torch.ones(7, 2))


def test_fresh_columns_change_nothing_and_learn_at_once():
    torch.manual_seed(0)
    own = Columns([(6, 36), (5, 4)], 3)
    found = own()
    assert [(len(v_Cd), len(A_Dd)) for v_Cd, A_Dd in found] == [(6, 36), (5, 4)]
    for v_Cd, A_Dd in found:
        assert not A_Dd.any()
        assert v_Cd.any(0).all()


def test_bytes_are_those_of_the_buffers():
    shapes = [(6, 36), (5, 4)]
    own = Columns(shapes, 3)
    own.pack()
    assert packed_bytes(shapes, 3) == sum(value.nbytes for value in own.buffers())
    assert not list(own.parameters())
