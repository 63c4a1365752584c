"""This host's record of images, increments and runs: SQLite, by Python's own module.

`database` opens it, `schema` says what it holds; `images` and `runs` read and write one subject each. The datastores
hold the truth about what is restorable; the catalog is what makes it quick to find, and gives images their numbers.
"""
