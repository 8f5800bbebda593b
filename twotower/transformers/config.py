"""The config of a two-tower checkpoint as transformers sees it."""

from __future__ import annotations

from typing import Any

from transformers import NemotronHConfig, PreTrainedConfig

ARCHITECTURE = "NemotronHTwoTowerForCausalLM"


class NemotronHTwoTowerConfig(PreTrainedConfig):  # type: ignore[misc]  # transformers has no types
    """All keys of a two-tower checkpoint's config.json, as attributes.

    Two-tower checkpoints and those of a single Nemotron-H tower have the same `model_type`. The
    config of a checkpoint whose `architectures` are not those of two towers is the one that
    transformers has for it, so that the library goes on loading such models by itself.
    """

    model_type = "nemotron_h"
    # The library drops this key from configs that do not name it.
    use_cache: bool = True

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """The config of a parsed config.json: of this class, or transformers' own for one tower."""
        two_towers = config_dict.get("architectures") == [ARCHITECTURE]
        read = super().from_dict if two_towers else NemotronHConfig.from_dict
        return read(config_dict, **kwargs)
