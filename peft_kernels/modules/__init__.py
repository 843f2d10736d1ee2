"""What is known of modules, whoever made them: wrappers, names, which layers can be a base.

Other libraries' classes are known by their full names, so that none is imported. Nothing here
knows an op, a layer of this package or a file format: this room imports none of the others.
"""
