"""Catalogue of devices and their links: what the models of time and memory need to know of each.

GPU figures: memory, memory bandwidth and the highest measured matrix product (MAMF, bf16 and fp8) from
stas00/ml-engineering, compute/accelerator (CC-BY-SA-4.0); peaks and one-direction link speeds from the vendors' data
sheets: NVLink of that generation inside a fast domain, and the network adapters of the DGX of that generation (one per
GPU). Where no measured product is published, the share of the peak is taken from the nearest relative. The CPU entry is
the order of magnitude of one core with 256-bit vectors and gloo over loopback: good for ranking meshes, no more.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

GIB = 1024**3


@dataclass(frozen=True, slots=True)
class Device:
    """One kind of device; rates are per device."""

    name: str
    backend: str
    """Collective backend (`gloo` or `nccl`): devices of different backends cannot train together."""
    peak_flops_per_s: float
    """Of dense bf16 products, as the vendor says: what MFU is relative to."""
    flops_per_s: float
    """Highest measured in bf16 matrix products."""
    fp8_flops_per_s: float
    """The same in fp8; 0 = has none, so that fp8 runs at the speed of bf16."""
    fp4_flops_per_s: float
    """Of dense fp4 products, as the vendor says; 0 = has none."""
    exponentials_per_s: float
    """Of special-function units: what softmax needs beside products."""
    memory_bytes: int
    """0 = depends on the host: only what nodes report counts."""
    memory_bytes_per_s: float
    node_bytes_per_s: float
    """To another device of the fast domain, one direction."""
    network_bytes_per_s: float
    """To a device outside of it, one direction."""
    latency_s: float
    """One hop of a collective."""
    overhead_s: float
    """Fixed cost per layer and micro-batch, forward and backward together (launches, Python)."""
    overlap: float
    """Share of the computing time behind which data-parallel communication hides."""
    number_bytes: int
    """Bytes of an activation or a gathered parameter: 2 where bf16 is the habit, 4 on CPU."""
    domain: int
    """Devices that reach each other at `node_bytes_per_s`."""


def _gpu(
    name: str,
    peak: float,
    measured: float,
    narrow: tuple[float, float],
    units: tuple[int, float],
    gigabytes: int,
    terabytes_per_s: float,
    links: tuple[float, float],
    domain: int = 8,
) -> Device:
    """TFLOP/s, TFLOP/s, TFLOP/s (in fp8, in fp4), (multiprocessors, GHz), GiB, TB/s, GB/s (inside, outside)."""
    return Device(
        name=name,
        backend="nccl",
        peak_flops_per_s=peak * 1e12,
        flops_per_s=measured * 1e12,
        fp8_flops_per_s=narrow[0] * 1e12,
        fp4_flops_per_s=narrow[1] * 1e12,
        exponentials_per_s=units[0] * 16 * units[1] * 1e9,
        memory_bytes=gigabytes * GIB,
        memory_bytes_per_s=terabytes_per_s * 1e12,
        node_bytes_per_s=links[0] * 1e9,
        network_bytes_per_s=links[1] * 1e9,
        latency_s=1e-5,
        overhead_s=5e-5,
        overlap=0.9,
        number_bytes=2,
        domain=domain,
    )


CATALOGUE = {
    device.name: device
    for device in (
        Device("cpu", "gloo", 3e10, 3e10, 0, 0, 1e9, 0, 1e10, 1e9, 1e9, 2e-4, 1e-3, 0.0, 4, 1_000_000),
        _gpu("v100", 125, 100, (0, 0), (80, 1.53), 32, 0.9, (150, 12.5)),
        _gpu("a100-40gb", 312, 271.2, (0, 0), (108, 1.41), 40, 1.555, (300, 25)),
        _gpu("a100", 312, 271.2, (0, 0), (108, 1.41), 80, 2.0, (300, 25)),
        _gpu("h100-hbm2e", 989, 794.5 * 500 / 700, (1402.6 * 500 / 700, 0), (132, 1.7), 96, 2.4, (450, 50)),
        _gpu("h100", 989, 794.5, (1402.6, 0), (132, 1.83), 80, 3.35, (450, 50)),
        _gpu("h200", 989, 794.5, (1453.4, 0), (132, 1.83), 141, 4.8, (450, 50)),
        _gpu("gh200", 989, 828.6, (1535.0, 0), (132, 1.83), 96, 4.0, (450, 25), 4),
        _gpu("b200", 2250, 1745, (3432.5, 9000), (148, 1.85), 180, 8.0, (900, 50)),
        _gpu("b300", 2250, 1769, (3353.3, 12600), (2 * 148, 1.85), 288, 8.0, (900, 100)),
        _gpu("gb200", 2500, 1822, (3615.6, 10000), (148, 1.9), 186, 8.0, (900, 50), 72),
        _gpu("gb300", 2500, 1822 * 1.2, (3615.6 * 1.2, 15000), (2 * 148, 1.9), 288, 8.0, (900, 100), 72),
        _gpu("mi300x", 1307, 1307 * 0.6, (2614 * 0.55, 0), (304, 2.1), 192, 5.3, (448, 50)),
    )
}
"""Devices by name. `h100-hbm2e` is the 500 W part with 96 GB; its measured product is scaled by its power."""


@dataclass(frozen=True, slots=True)
class Machine:
    """A device, and how many of them are how close together."""

    device: Device
    devices_per_node: int
    domain: int
    """Devices that reach each other at the speed inside: of an NVLink domain, or of a node."""
    rack: int = 0
    """Devices of a rack; 0 = the network is as thick everywhere."""
    oversubscription: float = 1.0
    """How many times thinner it is between racks."""

    @classmethod
    def of(cls, device: Device, devices_per_node: int, network_bytes_per_s: float | None = None) -> Machine:
        """Nodes of `devices_per_node`; `network_bytes_per_s` per device, where it is not the catalogue's."""
        if network_bytes_per_s is not None:
            device = replace(device, network_bytes_per_s=network_bytes_per_s)
        domain = device.domain if device.domain > 8 else min(device.domain, devices_per_node)
        return cls(device, devices_per_node, max(domain, 1))


def find(kind: str) -> Device | None:
    """The device named by a catalogue name or contained in a driver's name such as `NVIDIA H100 80GB HBM3`."""
    words = kind.lower()
    if words in CATALOGUE:
        return CATALOGUE[words]
    # `GH200` contains `h200` but is another machine: a name counts only where a word begins with it.
    parts = words.replace("-", " ").replace("_", " ").split()
    if "a100" in parts and {"40gb", "40g"} & set(parts):
        return CATALOGUE["a100-40gb"]
    if "h100" in parts and "hbm2e" in parts:
        return CATALOGUE["h100-hbm2e"]
    return next((device for name, device in CATALOGUE.items() if name in parts), None)
