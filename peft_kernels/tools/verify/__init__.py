"""``peft-kernels verify``: every op on the machine at hand beside float64, plan by plan.

``cases.py`` has what is computed, ``subjects.py`` the plans, ``machine.py`` what a device offers,
``checks.py`` what is looked at, ``rule.py`` what counts as right, ``rows.py`` what was found,
``parts.py`` the processes, and ``run.py`` the command.
"""
