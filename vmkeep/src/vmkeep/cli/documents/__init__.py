"""The documents of ``--json``, a module for each subject. Their keys are stable, and listed in docs/json.md.

Commands import the one of their subject: what the others work with need not be loaded for it.
"""
