"""Training: the step, the loop around it, evaluation and checkpoints."""

from jaxrec.train.checkpoint import CheckpointError as CheckpointError
from jaxrec.train.checkpoint import CheckpointStore as CheckpointStore
from jaxrec.train.checkpoint import CheckpointWarning as CheckpointWarning
from jaxrec.train.checkpoint import Restored as Restored
from jaxrec.train.config_diff import ConfigMismatch as ConfigMismatch
from jaxrec.train.evaluate import evaluate_ranking as evaluate_ranking
from jaxrec.train.evaluate import make_rank_fn as make_rank_fn
from jaxrec.train.evaluate import popularity_ranks as popularity_ranks
from jaxrec.train.evaluate import user_ranks as user_ranks
from jaxrec.train.loop import LoopConfig as LoopConfig
from jaxrec.train.loop import LoopResult as LoopResult
from jaxrec.train.loop import NonFiniteError as NonFiniteError
from jaxrec.train.loop import run_loop as run_loop
from jaxrec.train.optim import OptimizerConfig as OptimizerConfig
from jaxrec.train.optim import make_optimizer as make_optimizer
from jaxrec.train.optim import make_schedule as make_schedule
from jaxrec.train.progress import read_log as read_log
from jaxrec.train.step import LossConfig as LossConfig
from jaxrec.train.step import StepMetrics as StepMetrics
from jaxrec.train.step import TrainState as TrainState
from jaxrec.train.step import init_state as init_state
from jaxrec.train.step import make_step as make_step
from jaxrec.train.train import TrainConfig as TrainConfig
from jaxrec.train.train import run_config as run_config
from jaxrec.train.train import train as train
from jaxrec.train.train import with_params as with_params
