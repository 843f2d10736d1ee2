"""Attention that takes a prefix, in place of a model's own: what is called, and by whom.

Which prefix a call has is put into its state by :mod:`..runs`; here it is read. No module here
knows where in a model the attention layers are.
"""
