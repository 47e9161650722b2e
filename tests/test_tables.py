"""Tables over log sigma with several columns; `test_gate` holds those with one."""

import pytest
import torch

from gaussnet.tables import LevelTable

SIGMAS = torch.tensor([0.1, 1.0, 10.0])
VALUES = torch.tensor([[1.0, 0.0, -3.0], [2.0, 0.0, 4.0], [0.0, 0.0, 8.0]])


@pytest.mark.parametrize("shape", [(), (2,), (2, 5)], ids=str)
def test_columns_come_last(shape: tuple[int, ...]) -> None:
    table = LevelTable(SIGMAS, VALUES)
    out = table(torch.full(shape, 10**-0.5))
    assert out.shape == (*shape, 3)
    torch.testing.assert_close(out, torch.tensor([1.5, 0.0, 0.5]).expand_as(out))
    assert table(torch.full(shape, 1e4)).equal(VALUES[2].expand(*shape, 3))


def test_of_its_own_shape_again() -> None:
    table = LevelTable(SIGMAS, VALUES)
    twin = LevelTable.from_arguments(table.to_arguments())
    twin.load_state_dict(table.state_dict())
    assert twin(0.3).equal(table(0.3))
    assert repr(table) == "LevelTable(size=3)"


def test_gradients_reach_sigma() -> None:
    sigma = torch.tensor(2.0, dtype=torch.float64, requires_grad=True)
    torch.autograd.gradcheck(LevelTable(SIGMAS.double(), VALUES.double()), (sigma,))
