"""Thin Flax (NNX) modules: parameters, and one call into a pure function."""

from jaxrec.nn.hstu import HSTU as HSTU
from jaxrec.nn.hstu import HSTUConfig as HSTUConfig
from jaxrec.nn.moe import MoEConfig as MoEConfig
from jaxrec.nn.moe import MoELayer as MoELayer
from jaxrec.nn.moe import MoEReport as MoEReport
from jaxrec.nn.sasrec import SASRec as SASRec
from jaxrec.nn.sasrec import SASRecConfig as SASRecConfig
