"""What the five scripts share: the rooms checkpoint, pictures, scoring and training, and four files: command (errors,
exit codes), files (complete or absent), ranks (main process, device, type), compat (private names of other libraries).

Imports go one way: command, files, ranks, compat <- config <- checkpoint <- pictures <- scoring <- training <- scripts.
Nothing here imports one of the five scripts or a command in scripts/.
"""
