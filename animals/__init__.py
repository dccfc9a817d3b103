"""What the five scripts share: checkpoint, pictures, scoring, training, and four small files: command (a mistake is a
line and exit code 2), files (whole or none), ranks (which rank speaks, GPU or CPU, in which type), compat.

Imports go one way: command, files, ranks, compat <- config <- checkpoint <- pictures <- scoring <- training <- scripts.
Nothing here imports data_process_utils, train, validation or test; private names of other libraries: compat.py alone.
"""
