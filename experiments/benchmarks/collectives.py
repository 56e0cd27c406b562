"""The collectives in the text of a compiled program, and the bytes that each device sends.

The bytes on a ring of g devices, for a result of b bytes on each:

    all-reduce          2 (g - 1) / g * b
    all-gather          (g - 1) / g * b
    reduce-scatter      (g - 1) * b
    all-to-all          (g - 1) / g * b
    collective-permute  b
"""

import math
import re
from typing import NamedTuple


class Collective(NamedTuple):
    """An instruction that exchanges data between `group` devices. Each gets `size` bytes."""

    kind: str
    size: int
    group: int

    @property
    def sent(self) -> float:
        """The bytes that each device sends. See the docstring of the module."""
        share = (self.group - 1) / self.group
        factors = {"all-reduce": 2 * share, "reduce-scatter": self.group - 1}
        factors |= {"all-gather": share, "all-to-all": share, "collective-permute": 1}
        return factors[self.kind] * self.size


_COLLECTIVE = re.compile(
    r" = ([^=\n]+?) (all-(?:reduce|gather|to-all)|reduce-scatter|collective-permute)(-start)?\((.*)"
)


def collectives(hlo: str, devices: int) -> list[Collective]:
    """Returns the collectives of several devices in the HLO text of a program for `devices`."""
    found = []
    for match in _COLLECTIVE.finditer(re.sub(r"/\*.*?\*/", "", hlo)):
        shape, kind, start, rest = match.groups()
        if start and kind != "all-reduce":  # Operands come first in the result.
            without_layouts = re.sub(r"\{.*?\}", "", shape)
            shape = re.findall(r"\([^()]*\)|\w+\[[\d,]*\]", without_layouts[1:])[1]
        found.append(Collective(kind, _bytes(shape), _group_size(rest, devices)))
    return [collective for collective in found if collective.group > 1]


def _bytes(shape: str) -> int:
    """Returns the size of an HLO shape, which may be a tuple."""
    total = 0
    for dtype, sizes in re.findall(r"(\w+)\[([\d,]*)\]", shape):
        width = re.search(r"\d+", dtype)
        bits = int(width[0]) if width else {"pred": 8}.get(dtype, 0)
        total += bits * math.prod(int(size) for size in sizes.split(",") if size) // 8
    return total


def _group_size(attributes: str, devices: int) -> int:
    if mesh := re.search(r"replica_groups=mesh\[(.*?)\].*?\{(.*?)\}", attributes):
        sizes = dict(re.findall(r"(\w+)'?=(\d+)", mesh[1]))
        axes = re.findall(r"([a-zA-Z_]\w*)'?(?::\(\d+\)(\d+))?", mesh[2])
        return math.prod(int(part or sizes[name]) for name, part in axes)
    if iota := re.search(r"replica_groups=\[\d+,(\d+)\]<=", attributes):
        return int(iota[1])
    listed = re.search(r"replica_groups=\{\{([\d,]+)\}", attributes)
    return len(listed[1].split(",")) if listed else devices
