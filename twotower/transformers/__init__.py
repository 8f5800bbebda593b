"""Two-tower checkpoints behind transformers' Auto classes, without remote code.

    import twotower.transformers

After this import `AutoConfig`, `AutoModelForCausalLM` and `AutoTokenizer` load folders and hub ids
of two-tower checkpoints, and programs that were written for the released model run as they are.
The towers are loaded and run by this package; code that comes with a checkpoint is never run,
whatever `trust_remote_code` says. `SHIPPED_MODEL` is the folder of the model in this package.
"""

from __future__ import annotations

from transformers import AutoConfig, AutoModelForCausalLM

from twotower.towers.checkpoint.weights import SHIPPED_MODEL
from twotower.transformers.config import NemotronHTwoTowerConfig
from twotower.transformers.model import NemotronHTwoTowerForCausalLM

__all__ = ["SHIPPED_MODEL", "NemotronHTwoTowerConfig", "NemotronHTwoTowerForCausalLM"]

AutoConfig.register(NemotronHTwoTowerConfig.model_type, NemotronHTwoTowerConfig, exist_ok=True)
AutoModelForCausalLM.register(NemotronHTwoTowerConfig, NemotronHTwoTowerForCausalLM, exist_ok=True)
