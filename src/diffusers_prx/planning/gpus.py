"""What GPUs can do by their makers' data sheets, and what an hour of one costs.

Read in November 2026. Operations are those of dense matrices: data sheets lead with twice as many, for sparse ones.
"""

from dataclasses import dataclass

PRICES = (
    "prices are assumptions, about what specialised clouds asked on demand in 2026 "
    "(https://www.mercatus-ai.com/blog/cloud-gpu-pricing for H100, H200 and A100): give --price_per_hour"
)


@dataclass(frozen=True)
class GPU:
    """One kind of GPU.

    Args:
        name: in full.
        bf16_tflops: of the tensor cores, with float32 sums.
        float32_tflops: of the other cores, which take float32 unless TF32 is allowed.
        memory_gb: 1e9 bytes.
        link_gb_per_s: to the GPUs of its node, in one direction, 1e9 bytes.
        network_gb_per_s: to GPUs of other nodes, its share of the node's network, in one direction. The data sheet of
            the maker's own server (DGX) where there is one, else an assumption.
        price_per_hour: of one GPU, US dollars, see `PRICES`.
        source: of the figures.
    """

    name: str
    bf16_tflops: float
    float32_tflops: float
    memory_gb: float
    link_gb_per_s: float
    network_gb_per_s: float
    price_per_hour: float
    source: str


GPUS = {
    "a100": GPU(
        "NVIDIA A100 80GB SXM", 312, 19.5, 80, 300, 25, 1.30, "NVIDIA A100 data sheet; DGX A100: 200 Gb/s a GPU"
    ),
    "h100": GPU("NVIDIA H100 SXM", 989.4, 67, 80, 450, 50, 3.00, "NVIDIA H100 data sheet; DGX H100: 400 Gb/s a GPU"),
    "h200": GPU("NVIDIA H200 SXM", 989.4, 67, 141, 450, 50, 4.00, "NVIDIA H200 data sheet; DGX H200: 400 Gb/s a GPU"),
    "b200": GPU(
        "NVIDIA B200 SXM", 2250, 75, 180, 900, 50, 6.00, "NVIDIA HGX B200 data sheet; DGX B200: 400 Gb/s a GPU"
    ),
    "l40s": GPU(
        "NVIDIA L40S", 362, 91.6, 48, 32, 12.5, 1.00, "NVIDIA L40S data sheet (PCIe 4.0); network assumed: 100 Gb/s"
    ),
    "4090": GPU(
        "NVIDIA GeForce RTX 4090", 165.2, 82.6, 24, 32, 3.125, 0.50,
        "NVIDIA Ada GPU architecture whitepaper (PCIe 4.0); network assumed: 25 Gb/s",
    ),
    "5090": GPU(
        "NVIDIA GeForce RTX 5090", 209.5, 104.8, 32, 64, 3.125, 0.80,
        "NVIDIA RTX Blackwell GPU architecture whitepaper (PCIe 5.0); network assumed: 25 Gb/s",
    ),
}  # fmt: skip
