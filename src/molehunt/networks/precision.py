"""Where networks run unless somebody says otherwise, and which number format is fastest there."""

import torch


def default_device() -> torch.device:
    """Return the GPU where there is one, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def fast_dtype(device: torch.device) -> torch.dtype:
    """Return the number format in which convolutions run fastest on a device.

    A pure function of the device, never of a timing, so that two runs on one machine agree.

    Args:
        device: where the network will run.

    Returns:
        `torch.bfloat16` on a CPU with AMX, on an AMD CPU with AVX512_BF16 and on a GPU with bfloat16 units, else
        `torch.float32`.
    """
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float32
    if device.type == "cpu":
        abilities = torch.cpu.get_capabilities()
        # AVX512_BF16 alone is not enough: on a Xeon whose AMX is switched off a bfloat16 matrix product ran at
        # half the float32 rate, and convolutions were no faster. On an EPYC (Zen 4) both ran at twice the rate.
        amd = str(abilities.get("cpu_name", "")).startswith("AMD") and abilities.get("avx512_bf16", False)
        return torch.bfloat16 if amd or abilities.get("amx_bf16", False) else torch.float32
    return torch.float32
