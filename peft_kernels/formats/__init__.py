"""The peers' folders, read and written: PEFT's, PEFT's prompts', adapter-hub's.

A folder is checked whole before a model is touched, and written whole or not at all. Nothing here
computes; what a file's layers become is in the rooms below.
"""
