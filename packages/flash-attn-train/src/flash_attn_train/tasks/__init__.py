"""Lightning modules: what is computed in a training and a validation step."""

from flash_attn_train.tasks.language_model import LanguageModel

__all__ = ["LanguageModel"]
