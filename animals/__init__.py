"""What the five scripts share: checkpoint, pictures, scoring, training, and the four small files beside them.

Imports go one way: command, files, ranks, compat <- config <- checkpoint <- pictures <- scoring <- training <- scripts.
Nothing here imports one of the four verbs; private names of other libraries stand in compat.py alone.
"""
