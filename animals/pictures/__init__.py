"""Pictures on the disk: the one way pixels are read, what is known of each file, the caches, duplicates, the cut.

No model and no torch: what a network makes of a picture is computed in scoring/ and training/.
"""
