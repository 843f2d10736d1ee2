"""Modules: state and shapes over the ops of :mod:`peft_kernels.ops`."""

from peft_kernels.nn._prompt_init import label_prompt, text_prompt, vocabulary_prompt
from peft_kernels.nn._template import Template, TemplateBatch, Verbalizer
from peft_kernels.nn.adapter_bank import AdapterBank
from peft_kernels.nn.adapter_fusion import AdapterFusion
from peft_kernels.nn.bottleneck import BottleneckAdapter, stack_adapters
from peft_kernels.nn.invertible import InvertibleAdapter
from peft_kernels.nn.lora import LoRALinear
from peft_kernels.nn.lora_codes import QuantizedLoRALinear
from peft_kernels.nn.multi_lora import MultiLoRALinear
from peft_kernels.nn.multi_lora_codes import QuantizedMultiLoRALinear
from peft_kernels.nn.p_tuning import PTuning
from peft_kernels.nn.prefix_bank import PrefixBank
from peft_kernels.nn.prefix_multihead import prefix_multihead_attention
from peft_kernels.nn.prefix_tuning import PrefixTuning
from peft_kernels.nn.prompt_tuning import PromptTuning
from peft_kernels.nn.quantized_embedding import QuantizedEmbedding
from peft_kernels.nn.quantized_linear import QuantizedLinear

__all__ = [
    "AdapterBank",
    "AdapterFusion",
    "BottleneckAdapter",
    "InvertibleAdapter",
    "LoRALinear",
    "MultiLoRALinear",
    "PTuning",
    "PrefixBank",
    "PrefixTuning",
    "PromptTuning",
    "QuantizedEmbedding",
    "QuantizedLinear",
    "QuantizedLoRALinear",
    "QuantizedMultiLoRALinear",
    "Template",
    "TemplateBatch",
    "Verbalizer",
    "label_prompt",
    "prefix_multihead_attention",
    "stack_adapters",
    "text_prompt",
    "vocabulary_prompt",
]
