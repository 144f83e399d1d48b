"From a folder of photos to a served, calibrated classifier that knows when it does not know"
from typing import TYPE_CHECKING

__version__ = "0.1.0"

if TYPE_CHECKING:
    from amulet_hybrid.data.samples import make_samples
    from amulet_hybrid.jobs.api import inspect, load, train
    from amulet_hybrid.jobs.train import TrainingRun
    from amulet_hybrid.model.classifier import HybridClassifier

__all__ = ['HybridClassifier', 'TrainingRun', 'inspect', 'load', 'make_samples', 'train']

# Where each name is found when it is first asked for: importing the package loads nothing (PEP 562)
_HOMES = {'HybridClassifier': 'model.classifier', 'TrainingRun': 'jobs.train', 'inspect': 'jobs.api', 'load': 'jobs.api',
          'make_samples': 'data.samples', 'train': 'jobs.api'}

def __getattr__(name):
    if name not in _HOMES: raise AttributeError(f'module {__name__!r} has no attribute {name!r}')
    from importlib import import_module
    return getattr(import_module(f'{__name__}.{_HOMES[name]}'), name)

def __dir__(): return sorted([*globals(), *_HOMES])
