"""Molmo as a native transformers model: configuration, model, image processor, processor, published checkpoints."""

from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor

# `transformers.AutoImageProcessor` is a stand-in that refuses every use where torchvision is missing; this is the class.
from transformers.models.auto.image_processing_auto import AutoImageProcessor

from .configuration_molmo import MolmoConfig
from .conversion_molmo import register_molmo_conversion
from .image_processing_molmo import MolmoImageProcessor
from .modeling_molmo import MolmoForConditionalGeneration, MolmoModel
from .processing_molmo import MolmoProcessor, build_word_tokenizer


__all__ = [
    "MolmoConfig",
    "MolmoForConditionalGeneration",
    "MolmoImageProcessor",
    "MolmoModel",
    "MolmoProcessor",
    "build_word_tokenizer",
]

register_molmo_conversion()
AutoConfig.register("molmo", MolmoConfig)
AutoModelForImageTextToText.register(MolmoConfig, MolmoForConditionalGeneration)
AutoImageProcessor.register(MolmoConfig, slow_image_processor_class=MolmoImageProcessor)
AutoProcessor.register(MolmoConfig, MolmoProcessor)
