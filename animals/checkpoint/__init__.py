"""What a checkpoint folder holds and how it is checked, loaded, saved and resumed; which model families are accepted.

It knows no pictures, no label's probability and no trainer: what a run does with a checkpoint is in the rooms after it.
"""
