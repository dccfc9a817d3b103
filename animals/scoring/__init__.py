"""How good is a checkpoint: the scorer, the numbers, the rivals, the report and its page.

Works on a loaded model and on any rank; nothing here trains, and neither trl nor deepspeed is imported.
"""
