"""TransformerLens's model, its configs and its names of models: the only module that imports transformer_lens.

transformer-lens 4 has none of these names. sae-lens 6.54 does not work with it either: `library_versions` says so in one line.
"""

from transformer_lens import HookedTransformer
from transformer_lens.loading_from_pretrained import (
    get_official_model_name,
    get_pretrained_model_config,
    get_pretrained_state_dict,
    make_model_alias_map,
)

__all__ = [
    "HookedTransformer",
    "get_official_model_name",
    "get_pretrained_model_config",
    "get_pretrained_state_dict",
    "make_model_alias_map",
]
