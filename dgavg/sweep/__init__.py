"""Sweeps: Hydra's launchers run the jobs of a command, which report through files.

`words` reads the command line, `multirun` makes jobs of it and launches them, `job` is what runs in
each of their processes, `reports` what it leaves for the parent.
"""
