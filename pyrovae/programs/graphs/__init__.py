"""Pyro programs as compiled graphs: Pyro's handlers run once, and what they did to tensors is replayed.

A function is traced at PyTorch's dispatcher (`make_fx`), below Pyro, distributions and autograd, so that its
trace is a flat list of operations, those of its gradients among them. Tensors that it reaches besides its
arguments (parameters, buffers, an estimator's running means) become inputs of the graph, which reads and
changes them where they stand. TorchInductor compiles the graph. Noise comes from PyTorch's generators by the
operations that the function uses, so that a seed gives the noise that it gives without a graph.

A graph holds for what its trace was made with. Other shapes, types, devices, settings, modules or modes get a
graph of their own: `Guards` watches whatever the function refers to. Because not everything can be watched, a
graph is also compared with the function, at its calls number 1, 2, 4, 8 and so on. What cannot be traced, or
differs, runs as it is, with one warning that says why.
"""

from pyrovae.programs.graphs.captures import Capture, CaptureWarning
from pyrovae.programs.graphs.comparisons import NotCaptured
from pyrovae.programs.graphs.replays import Replay
from pyrovae.programs.graphs.steps import Step, capture
from pyrovae.programs.graphs.traces import inductor
from pyrovae.runtime.denormals import flushed_denormals, start_workers

__all__ = [
    "Capture",
    "CaptureWarning",
    "NotCaptured",
    "Replay",
    "Step",
    "capture",
    "flushed_denormals",
    "inductor",
    "start_workers",
]
