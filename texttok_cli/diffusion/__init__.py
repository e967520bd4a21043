"""Diffusion and flow matching on latents: processes, samplers and guidance. The network is passed in."""

from texttok_cli.config.guidance import Guidance, parse_cfg
from texttok_cli.config.schema import FITTING
from texttok_cli.diffusion.process import build_process
from texttok_cli.diffusion.samplers import SAMPLERS, SampleRng
from texttok_cli.diffusion.sampling import Sampling, plan_sampling, sample

__all__ = ["FITTING", "SAMPLERS", "Guidance", "SampleRng", "Sampling", "build_process", "parse_cfg", "plan_sampling", "sample"]
