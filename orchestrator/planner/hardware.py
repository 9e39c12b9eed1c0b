"""Catalogue of devices: what the cost and memory models need to know of each.

GPU figures: peak dense bf16, memory, memory bandwidth and the highest measured matrix product (MAMF) from
stas00/ml-engineering, compute/accelerator (CC-BY-SA-4.0); link speeds are the vendors' per-direction NVLink figures
and the network of the DGX of that generation (one adapter per GPU). `flops_per_s` is half of the measured matrix
product: what whole training steps of published runs reach of it before exposed communication. The CPU entry is the
order of magnitude of one core with 256-bit vectors and gloo over loopback, good for ranking meshes and nothing else.
"""

from __future__ import annotations

from dataclasses import dataclass

GIB = 1024**3


@dataclass(frozen=True, slots=True)
class Device:
    """One kind of device; rates are per device."""

    name: str
    backend: str
    """Collective backend (`gloo` or `nccl`): devices of different backends cannot train together."""
    flops_per_s: float
    """Sustained in large matrix products inside a training step."""
    memory_bytes: int
    """0 = depends on the host: only what nodes report counts."""
    memory_bytes_per_s: float
    node_bytes_per_s: float
    """To another device of the same node, one direction."""
    network_bytes_per_s: float
    """To a device of another node, one direction."""
    latency_s: float
    """One hop of a collective."""
    overhead_s: float
    """Fixed cost per layer and micro-batch, forward and backward together (launches, Python)."""
    overlap: float
    """Share of the computing time behind which data-parallel communication hides."""
    number_bytes: int
    """Bytes of an activation or a gathered parameter: 2 where bf16 is the habit, 4 on CPU."""


CATALOGUE = {
    device.name: device
    for device in (
        Device("cpu", "gloo", 3e10, 0, 1e10, 1e9, 1e9, 2e-4, 1e-3, 0.0, 4),
        Device("a100", "nccl", 271.2e12 / 2, 80 * GIB, 2.0e12, 300e9, 25e9, 1e-5, 1e-4, 0.5, 2),
        Device("h100", "nccl", 794.5e12 / 2, 80 * GIB, 3.35e12, 450e9, 50e9, 1e-5, 1e-4, 0.5, 2),
        Device("h200", "nccl", 794.5e12 / 2, 141 * GIB, 4.8e12, 450e9, 50e9, 1e-5, 1e-4, 0.5, 2),
        Device("b200", "nccl", 1745e12 / 2, 180 * GIB, 8.0e12, 900e9, 50e9, 1e-5, 1e-4, 0.5, 2),
    )
}
"""Devices by name."""


def find(kind: str) -> Device | None:
    """The device named by a catalogue name or contained in a driver's name such as `NVIDIA H100 80GB HBM3`."""
    words = kind.lower()
    if words in CATALOGUE:
        return CATALOGUE[words]
    # `GH200` contains `h200` but is another machine: a name counts only where a word begins with it.
    parts = words.replace("-", " ").replace("_", " ").split()
    return next((device for name, device in CATALOGUE.items() if name in parts), None)
