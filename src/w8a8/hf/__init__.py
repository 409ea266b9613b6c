"""transformers, unmodified: a model is quantised while it is loaded, and W8A8 directories run in integers.

    AutoModelForCausalLM.from_pretrained(float_model, quantization_config=w8a8.W8A8Config("w8a8"))
    w8a8.enable(); AutoModelForCausalLM.from_pretrained(w8a8_directory)

Both are a quantizer that transformers calls while it loads (`quantizer`).  For the second the configuration class that
transformers has for compressed-tensors is replaced (`enabling`).  The model's `save_pretrained` then writes the
directory that `w8a8.save` writes.
"""

from w8a8.hf.enabling import disable, enable, enabled
from w8a8.hf.quantizer import W8A8Config

__all__ = ["W8A8Config", "disable", "enable", "enabled"]
