"""What is done to a whole model: layers swapped in, frozen, merged, turned off and taken out.

Any ``nn.Module`` will do; what needs to know a host library's models is in
:mod:`peft_kernels.integrations`, and what touches a file in :mod:`peft_kernels.formats`.
"""
