"""Images and their classes."""

from flash_attn_train.data.images.build import steps_of_epochs
from flash_attn_train.data.images.folder import ImageFolder, read_image_folder
from flash_attn_train.data.images.mixing import Mixing
from flash_attn_train.data.images.samples import ImageSamples, LabelledImages, RepeatedOrder

__all__ = [
    "ImageFolder",
    "ImageSamples",
    "LabelledImages",
    "Mixing",
    "RepeatedOrder",
    "read_image_folder",
    "steps_of_epochs",
]
