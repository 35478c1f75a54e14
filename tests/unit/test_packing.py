"""How many trials run at once: arithmetic, and a refusal that shows it."""

import pytest

from partialhn.errors import InputError
from pipelines.search.packing import GIB, Room, pack

SMALL, LARGE = Room(2, 0, 8 * GIB), Room(16, 2, 64 * GIB)


@pytest.mark.parametrize(("need", "per_node"), [
    (Room(1, 0, GIB), (2, 16)),
    (Room(0.5, 0, GIB), (4, 32)),
    (Room(1, 0.25, GIB), (0, 8)),
    (Room(1, 0, 5 * GIB), (1, 12)),
    (Room(0.1, 0, GIB), (8, 64))])
def test_the_scarcest_of_cpus_gpus_and_memory_decides(need, per_node):
    packing = pack(need, [SMALL, LARGE])
    assert packing.per_node == per_node
    assert packing.at_once == sum(per_node)


def test_a_limit_is_kept_and_said():
    packing = pack(Room(1, 0, GIB), [SMALL, LARGE], 3)
    assert packing.at_once == 3
    assert "2 + 16" in str(packing)
    assert "limited to 3" in str(packing)


@pytest.mark.parametrize("need", [Room(17, 0, GIB), Room(1, 4, GIB), Room(1, 0, 65 * GIB)])
def test_what_fits_nowhere_is_refused_with_the_numbers(need):
    with pytest.raises(InputError) as caught:
        pack(need, [SMALL, LARGE])
    text = str(caught.value)
    assert str(need) in text
    assert "node 1: 2 CPU" in text
    assert "node 2: 16 CPU, 2 GPU, 64.00 GiB" in text
