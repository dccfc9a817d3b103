"""How good is a checkpoint: the scorer, the numbers, the rivals, the label audit, the report and its pages;
and what is done with the answers: serve, sort. The scorer loads its model and works on any rank; nothing
here trains, and neither trl nor deepspeed is imported.
"""
