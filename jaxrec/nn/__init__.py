"""Thin Flax (NNX) modules: parameters, and one call into a pure function."""

from jaxrec.nn.formula import FormulaError as FormulaError
from jaxrec.nn.hstu import HSTU as HSTU
from jaxrec.nn.hstu import HSTUConfig as HSTUConfig
from jaxrec.nn.mixture_of_logits import MixtureOfLogits as MixtureOfLogits
from jaxrec.nn.mixture_of_logits import MixtureOfLogitsConfig as MixtureOfLogitsConfig
from jaxrec.nn.moe import MoEConfig as MoEConfig
from jaxrec.nn.moe import MoELayer as MoELayer
from jaxrec.nn.moe import MoEReport as MoEReport
from jaxrec.nn.moe import check_routers as check_routers
from jaxrec.nn.moe_layouts import export_moe as export_moe
from jaxrec.nn.moe_layouts import import_moe as import_moe
from jaxrec.nn.overarch import AttentionOverArch as AttentionOverArch
from jaxrec.nn.overarch import AttentionOverArchConfig as AttentionOverArchConfig
from jaxrec.nn.overarch import MLPOverArch as MLPOverArch
from jaxrec.nn.overarch import MLPOverArchConfig as MLPOverArchConfig
from jaxrec.nn.overarch import OverArch as OverArch
from jaxrec.nn.sasrec import SASRec as SASRec
from jaxrec.nn.sasrec import SASRecConfig as SASRecConfig
from jaxrec.nn.towers import TaskHeads as TaskHeads
from jaxrec.nn.towers import TaskHeadsConfig as TaskHeadsConfig
from jaxrec.nn.towers import TwoStage as TwoStage
from jaxrec.nn.towers import TwoStageConfig as TwoStageConfig
from jaxrec.nn.towers import overarch_of as overarch_of
from jaxrec.nn.value_model import ValueModel as ValueModel
