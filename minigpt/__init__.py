"""Train, inspect and share small GPT models, from notebooks that are the source of the package."""

__version__ = "0.1.0"

import sys
import warnings
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec

# Modules of the time before packages. Their old names are imported with a warning in 0.1 and gone in 0.2.
MOVED = {
    "analyze": "checkpoint.analysis",
    "backup": "run.backup",
    "compare": "checkpoint.comparison",
    "corpus": "data.corpus",
    "download": "data.download",
    "dpo": "train.preference",
    "evaluate": "train.evaluation",
    "export": "checkpoint.exporter",
    "files": "core.files",
    "formats": "data.readers",
    "generate": "model.generation",
    "guard": "run.guard",
    "headers": "checkpoint.headers",
    "lora": "model.adapters",
    "monitor": "run.metrics",
    "optim": "train.optim",
    "parallel": "train.parallel",
    "picture": "core.picture",
    "prepare": "data.preparation",
    "presets": "train.presets",
    "quality": "data.quality",
    "quantize": "model.quantization",
    "registry": "data.registry",
    "schedule": "config.schedule",
    "source": "train.inputs",
    "speed": "train.speed",
    "status": "run.status",
    "template": "tokenizer.template",
}


class _Moved(MetaPathFinder, Loader):
    "Finds `minigpt.lora` where it is now: `minigpt.model.adapters`."

    def find_spec(self, name, path=None, target=None):
        package, _, module = name.partition(".")
        if package == "minigpt" and module in MOVED:
            return ModuleSpec(name, self)

    def create_module(self, spec):
        return None

    def exec_module(self, module):
        old = module.__name__
        new = f"minigpt.{MOVED[old.partition('.')[2]]}"
        warnings.warn(f"{old} is now {new}", FutureWarning, stacklevel=2)
        sys.modules[old] = import_module(new)


sys.meta_path.append(_Moved())
