"""Decoders as Hugging Face transformers has them: which architecture a model is there, its config.json, its tensors."""

from tidegate.model.huggingface.architectures import Architecture, architecture_of
from tidegate.model.huggingface.configs import config_of, model_of
from tidegate.model.huggingface.tensors import FromHuggingFace, ToHuggingFace

__all__ = ["Architecture", "FromHuggingFace", "ToHuggingFace", "architecture_of", "config_of", "model_of"]
