"""Flash attention for packed documents on Hopper GPUs, in Pallas Mosaic GPU."""

from jsft.kernels.flash.attention import flash_attention, runs_fused

__all__ = ["flash_attention", "runs_fused"]
