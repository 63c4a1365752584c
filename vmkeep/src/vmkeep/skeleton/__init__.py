"""A new driver's package, as ``vmkeep driver new`` writes it: its code is `shelf`, the ``.in`` files are the rest."""
