"""GPUs and clusters in their data sheets' figures."""

from __future__ import annotations

import difflib
import math
from dataclasses import dataclass

from megafish.errors import InputError
from megafish.model.flops import PEAK_BF16_FLOPS

GIB = 2**30


@dataclass(frozen=True)
class Gpu:
    """One GPU. Bandwidths are in bytes per second, those of links in one direction."""

    name: str
    part: str
    """Key of PEAK_BF16_FLOPS, by which a run's MFU is counted too."""
    memory: float
    """Bytes that torch reports as the device's total memory: a little less than what is printed on the box."""
    bandwidth: float
    """HBM."""
    link: float
    """To the other GPUs of its node: NVLink (half of the advertised sum of both directions), else PCIe."""
    network: float
    """To other nodes, where `--network-gbps` does not say: one adapter a GPU, as in the maker's reference system."""
    generation: str
    """Whose measured efficiencies count: ampere, hopper or blackwell."""

    @property
    def peak(self) -> float:
        """Dense bf16 FLOP/s."""
        return PEAK_BF16_FLOPS[self.part]


GPUS = {
    gpu.name: gpu
    for gpu in (
        Gpu("a100-40gb", "A100", 39.4 * GIB, 1.555e12, 300e9, 25e9, "ampere"),
        Gpu("a100", "A100", 79.15 * GIB, 2.039e12, 300e9, 25e9, "ampere"),
        Gpu("l40s", "L40S", 44.4 * GIB, 0.864e12, 32e9, 25e9, "ampere"),
        Gpu("h100-pcie", "H100 PCIe", 79.1 * GIB, 2.0e12, 64e9, 50e9, "hopper"),
        Gpu("h100", "H100", 79.1 * GIB, 3.35e12, 450e9, 50e9, "hopper"),
        Gpu("h200", "H200", 139.7 * GIB, 4.8e12, 450e9, 50e9, "hopper"),
        Gpu("b200", "B200", 178.3 * GIB, 8.0e12, 900e9, 50e9, "blackwell"),
        Gpu("mi300x", "MI300X", 191.9 * GIB, 5.3e12, 448e9, 50e9, "hopper"),
    )
}
"""NVIDIA's data sheets (A100 2021, L40S 2023, H100 2023, H200 2024, HGX B200 2024) and AMD's (MI300X 2023). L40S, B200
and MI300X have no published run among the calibration's: their efficiencies are those of the generation named."""


def find_gpu(name: str) -> Gpu:
    """The GPU of this name. Raises InputError with the nearest known one."""
    gpu = GPUS.get(name.lower())
    if gpu is None:
        near = difflib.get_close_matches(name.lower(), GPUS, n=1)
        hint = f" (did you mean {near[0]}?)" if near else ""
        raise InputError(f"--gpu {name}{hint}: known are {', '.join(GPUS)}")
    return gpu


@dataclass(frozen=True)
class Cluster:
    """Equal GPUs in equal nodes."""

    gpu: Gpu
    gpus: int
    gpus_per_node: int
    network: float
    """Bytes per second and direction between nodes, for each GPU."""
    host_memory: float | None = None
    """Bytes of main memory of a node; None: not known, so nothing may be offloaded to it."""

    @property
    def nodes(self) -> int:
        """Nodes."""
        return -(-self.gpus // self.gpus_per_node)

    def bandwidth(self, members: int, stride: int = 1) -> float:
        """Bytes per second that each of `members` processes, `stride` ranks apart, can send in a ring collective.

        Within a node NVLink. Between nodes as many rings run as the group has members in a node, each over its own
        adapter, so that the adapters add up until NVLink is the narrower.
        """
        if (members - 1) * stride < self.gpus_per_node:
            return self.gpu.link
        return min(self.gpu.link, self.network * max(1, self.gpus_per_node // stride))


def make_cluster(
    gpu: str,
    gpus: int,
    *,
    gpus_per_node: int | None = None,
    network_gbps: float | None = None,
    host_memory_gib: float | None = None,
) -> Cluster:
    """A cluster from the command line's options; `network_gbps` is per GPU and direction. Raises InputError."""
    found = find_gpu(gpu)
    per_node = gpus_per_node if gpus_per_node is not None else min(8, gpus)
    if gpus > per_node and gpus % per_node:
        raise InputError(
            f"--gpus {gpus} is not a multiple of --gpus-per-node {per_node}: "
            f"use {gpus // per_node * per_node} or {-(-gpus // per_node) * per_node}"
        )
    if network_gbps is not None and not 0 < network_gbps < math.inf:
        raise InputError(f"--network-gbps {network_gbps:g}: must be a number above 0 (gigabits a second for each GPU)")
    network = found.network if network_gbps is None else network_gbps * 1e9 / 8
    host = None if host_memory_gib is None else host_memory_gib * GIB
    return Cluster(found, gpus, min(per_node, gpus), network, host)
