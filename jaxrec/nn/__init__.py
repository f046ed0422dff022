"""Thin Flax (NNX) modules: parameters, and one call into a pure function."""

from jaxrec.nn.formula import FormulaError as FormulaError
from jaxrec.nn.hstu import HSTU as HSTU
from jaxrec.nn.hstu import HSTUConfig as HSTUConfig
from jaxrec.nn.mixture_of_logits import MixtureOfLogits as MixtureOfLogits
from jaxrec.nn.mixture_of_logits import MixtureOfLogitsConfig as MixtureOfLogitsConfig
from jaxrec.nn.moe import ExpertBias as ExpertBias
from jaxrec.nn.moe import MoEConfig as MoEConfig
from jaxrec.nn.moe import MoELayer as MoELayer
from jaxrec.nn.moe import MoEReport as MoEReport
from jaxrec.nn.moe import encode_with_reports as encode_with_reports
from jaxrec.nn.moe import update_expert_bias as update_expert_bias
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
