"""PEFT's folders of prefix-tuning, P-tuning and prompt tuning."""

from peft_kernels.formats.peft_prompts.folder import load_prompt, save_prompt

__all__ = ["load_prompt", "save_prompt"]
