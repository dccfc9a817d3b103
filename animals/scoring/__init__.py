"""How good is a checkpoint: the scorer, the numbers, the report and its pages, an encoder's features.
The scorer loads its model and works on any rank. Nothing here trains, and nothing imports trl or deepspeed.
What only one command in scripts/ needs lives in that command's file, not here.
"""
