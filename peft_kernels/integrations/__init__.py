"""Where the package plugs into other libraries: one package a host.

Each imports its host when it is used, never with the package. Folders in a host's format are read
and written in :mod:`peft_kernels.formats`, which may import from here and not the other way round.
"""
