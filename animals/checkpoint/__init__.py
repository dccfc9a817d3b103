"""A checkpoint folder, all that is LLaVA's own: check it, load it, save it, its steps and what resumes them,
its task (labels, question), its tokens a picture.

Knows no pictures, no labels' scores and no trainer: what a run does with a checkpoint lives above.
"""
