"""What a checkpoint folder holds and how it is checked, loaded, saved and resumed; which model families are accepted.

It knows neither pictures nor a label's probability nor the trainer: what a run does with a checkpoint lives in the
rooms above.
"""
