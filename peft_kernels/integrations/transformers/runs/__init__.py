"""A model's forward with a prefix or a prompt: hooks that set the state and the inputs.

One module a way to run: prefixes, prompts in the rows, prompts in front of them as prefixes.
Public functions that add and remove them are one level above.
"""
