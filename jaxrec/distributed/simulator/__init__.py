"""A discrete-event simulator of sequence-recommender training on many GPUs.

    machine, model = MachineConstants(), ModelConstants()
    report = simulate(lengths, machine, model, Mechanisms(balance="lpt", prioritised=True))
    print(report.bubble, report.samples_per_second)

`engine` knows ops, resources and collectives, and nothing of training; `constants` holds every
number that goes in, each with its source; `step` says which ops a training step is made of;
`report` reads bubbles off the finished timeline. What comes out is put in nowhere.
"""

from jaxrec.distributed.simulator.constants import ASSUMED as ASSUMED
from jaxrec.distributed.simulator.constants import SOURCES as SOURCES
from jaxrec.distributed.simulator.constants import MachineConstants as MachineConstants
from jaxrec.distributed.simulator.constants import ModelConstants as ModelConstants
from jaxrec.distributed.simulator.engine import Simulation as Simulation
from jaxrec.distributed.simulator.engine import Timeline as Timeline
from jaxrec.distributed.simulator.report import Report as Report
from jaxrec.distributed.simulator.report import simulate as simulate
from jaxrec.distributed.simulator.step import Mechanisms as Mechanisms
