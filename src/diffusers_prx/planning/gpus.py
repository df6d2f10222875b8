"""Data of GPUs from their makers' data sheets, and assumed prices.

As of November 2026. FLOP/s are those of dense matrices; data sheets often quote twice as many, for sparse ones.
"""

from dataclasses import dataclass

PRICES = (
    "prices are assumptions: on-demand prices of specialized clouds in 2026 "
    "(https://www.mercatus-ai.com/blog/cloud-gpu-pricing for H100, H200 and A100)"
)


@dataclass(frozen=True)
class GPU:
    """A GPU model.

    Args:
        name: full name.
        bf16_tflops: bf16 peak with float32 accumulation, in 1e12 FLOP/s.
        float32_tflops: float32 peak without TF32, in 1e12 FLOP/s.
        memory_gb: memory in 1e9 bytes.
        link_gb_per_s: bandwidth to the GPUs of its node, in one direction, in 1e9 bytes per second.
        network_gb_per_s: share of the node's network, in one direction, in 1e9 bytes per second: from the data sheet
            of the maker's server (DGX) if there is one, otherwise an assumption.
        price_per_hour: US dollars, see `PRICES`.
        source: data sheet.
    """

    name: str
    bf16_tflops: float
    float32_tflops: float
    memory_gb: float
    link_gb_per_s: float
    network_gb_per_s: float
    price_per_hour: float
    source: str


_DGX_H100 = "NVIDIA H100 data sheet; DGX H100: 400 Gb/s per GPU"
_ADA = "NVIDIA Ada GPU architecture whitepaper (PCIe 4.0); network assumed: 25 Gb/s"
_BLACKWELL = "NVIDIA RTX Blackwell GPU architecture whitepaper (PCIe 5.0); network assumed: 25 Gb/s"
_DGX_H200 = "NVIDIA H200 data sheet; DGX H200: 400 Gb/s per GPU"
_DGX_A100 = "NVIDIA A100 data sheet; DGX A100: 200 Gb/s per GPU"
_DGX_B200 = "NVIDIA HGX B200 data sheet; DGX B200: 400 Gb/s per GPU"
_L40S = "NVIDIA L40S data sheet (PCIe 4.0); network assumed: 100 Gb/s"
GPUS = {
    "a100": GPU("NVIDIA A100 80GB SXM", 312, 19.5, 80, 300, 25, 1.30, _DGX_A100),
    "h100": GPU("NVIDIA H100 SXM", 989.4, 67, 80, 450, 50, 3.00, _DGX_H100),
    "h200": GPU("NVIDIA H200 SXM", 989.4, 67, 141, 450, 50, 4.00, _DGX_H200),
    "b200": GPU("NVIDIA B200 SXM", 2250, 75, 180, 900, 50, 6.00, _DGX_B200),
    "l40s": GPU("NVIDIA L40S", 362, 91.6, 48, 32, 12.5, 1.00, _L40S),
    "4090": GPU("NVIDIA GeForce RTX 4090", 165.2, 82.6, 24, 32, 3.125, 0.50, _ADA),
    "5090": GPU("NVIDIA GeForce RTX 5090", 209.5, 104.8, 32, 64, 3.125, 0.80, _BLACKWELL),
}
